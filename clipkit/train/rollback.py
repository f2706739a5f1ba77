"""Back to the newest checkpoint after a leap of the loss, and past the batches that led to it.

Training again on the same batches would leap again, bit for bit. So they are passed over: a step is counted
for each, nothing is computed. Which ones is written into the checkpoint before training goes on, so a run
that is killed afterwards passes over the same ones.
"""

from __future__ import annotations

from collections.abc import Callable

from clipkit.checkpoint import CheckpointStore
from clipkit.data.rejects import RejectBudget
from clipkit.log import RunLog
from clipkit.train.resume import Kept, continue_rng, kept_evaluation
from clipkit.train.setup import Run
from clipkit.train.spikes import Spike
from clipkit.train.state import TrainState, restore
from clipkit.types import ClipkitError

MAX_ROLLBACKS = 3
# Spikes come from a stretch of data meeting a state of the weights: PaLM (arXiv:2204.02311, section 5.1)
# passed over 200 to 500 batches around each.
MAX_PASSED = 50


def roll_back(
    run: Run, store: CheckpointStore, state: TrainState, budget: RejectBudget, log: RunLog, spike: Spike
) -> tuple[TrainState, Kept | None, Callable[[], None]]:
    """Changes the run, its budget and its logs back to the newest checkpoint; all ranks call it.

    state: where the run stands, the step of the spike counted. Returns where it stands now, with the batches
    from the checkpoint to the spike (at most the last 50) among `passed`; the evaluation of the checkpoint;
    and what restores the random states. The caller saves before it goes on. Raises ClipkitError instead of a
    fourth rollback.
    """
    if state.rollbacks >= MAX_ROLLBACKS:
        raise ClipkitError(
            f"{spike} at step {state.step}, after {MAX_ROLLBACKS} rollbacks",
            "lower optim.lr or lengthen optim.warmup, in another run.dir: the last checkpoint of this one is "
            "intact, and run.on_spike: warn or skip continues it",
        )
    found = store.newest()
    assert found is not None, "a run that may roll back saves before its first step"
    kept = kept_evaluation(run, found)
    restored = restore(run, found, budget)
    run.trackers.rewind(restored.step)
    first = max(restored.step, state.step - MAX_PASSED)
    restored.passed = sorted({*state.passed, *range(first, state.step)})
    restored.rollbacks = state.rollbacks + 1
    if kept is not None and kept.cut:
        log.append(kept.record, again=True)
    passed = [first + 1, state.step]
    cause = f"{spike} at step {state.step}"
    log.append(
        {"event": "rollback", "step": state.step, "to": restored.step, "passed": passed, "cause": cause}
    )
    log.note(
        f"warning: {cause}; back to the checkpoint of step {restored.step}, and past the batches of steps "
        f"{passed[0]} to {passed[1]} (rollback {restored.rollbacks} of at most {MAX_ROLLBACKS})"
    )
    continue_rng(run, found)
    return restored, kept, lambda: continue_rng(run, found)
