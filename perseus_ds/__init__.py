"""Perseus for DeepSpeed: removes energy bloat from pipeline-parallel training.

Nothing needs to be imported: with the package installed, `"perseus": {"enabled": true}` in the DeepSpeed config is
enough. Where entry points are switched off (`TORCH_DEVICE_BACKEND_AUTOLOAD=0`) or torch is older than 2.5, one line,
before or after `import deepspeed`, does the same:

    import perseus_ds
"""

from perseus_autoload import await_import

await_import("deepspeed.runtime.pipe.engine")
