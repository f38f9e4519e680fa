"""Perseus for Megatron: removes energy bloat from pipeline-parallel training.

With the package installed, `--perseus` on the command line of a Megatron pretrain script is enough. Where entry points
are switched off (`TORCH_DEVICE_BACKEND_AUTOLOAD=0`) or torch is older than 2.5, either of these does the same:

    torchrun ... -m perseus_megatron pretrain_gpt.py ... --perseus
    import perseus_megatron                      # one line in a script of one's own

Programs on megatron-core that do not use `megatron.training` call `enable`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perseus_autoload import await_import

if TYPE_CHECKING:
    from perseus_core.runtime.settings import Settings
    from perseus_megatron.following import FollowedTraining
    from perseus_megatron.layout import Layout

await_import("megatron.training.arguments")


def enable(
    settings: Settings | Mapping[str, Any],
    model: Any | Sequence[Any],
    *,
    layout: Layout | None = None,
    metric: Callable[[str, float], None] | None = None,
) -> FollowedTraining:
    """Follows a training loop on megatron-core that does not use `megatron.training`.

    Call it on every rank, once the model is there and before `get_forward_backward_func()`:

        training = perseus_megatron.enable({"enabled": True}, model)
        run = get_forward_backward_func()
        for batch in batches:
            with training.step():  # optional: counts the optimizer step into the iteration
                run(forward_step_func=..., model=model, ...)
                optimizer.step()
        training.close()

    Args:
        settings: the keys of the `perseus` block, or the checked settings.
        model: as `forward_backward_func` gets it: a module, or the list of this rank's model chunks.
        layout: this rank's place; by default as `megatron.core.parallel_state` says.
        metric: called with the name and value of what is measured under a plan (`iteration_time_s`, `energy_j`,
            `saving`). All ranks know it, so it may be given on the rank that keeps the metrics and on no other.

    Raises:
        InputError: naming the key that is wrong, its value and the remedy. Nothing else is raised: what cannot be
            followed is left alone after one line that says why.
    """
    from perseus_core.runtime.settings import Settings
    from perseus_megatron.following import follow

    checked = settings if isinstance(settings, Settings) else Settings.from_mapping(settings)
    return follow(checked, model, layout=layout, metric=metric)


def current() -> FollowedTraining | None:
    """The training that is followed in this process, for schedules of one's own that announce what they do.

    A zero-bubble schedule, say, announces the two parts of a backward pass as instructions of their own:

        with perseus_megatron.current().instruction("backward_input", microbatch=3):
            ...
    """
    from perseus_megatron.following import current_training

    return current_training()
