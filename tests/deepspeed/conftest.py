from __future__ import annotations

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; `pip install .[deepspeed]`")
