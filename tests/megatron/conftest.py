from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed; `pip install .[megatron]`")
