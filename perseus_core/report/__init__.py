"""Figures, the interactive page and terminal tables. Only this package imports matplotlib, and only when it draws."""
