"""Progress within a batch, below Lightning's bar over batches."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.progress import TaskID

from steadyflow.modules.inversion import Inverting
from steadyflow.modules.sampling import Sampling


class StepProgress(L.Callback):
    """Shows how far the work is within its batch: a second line under a rich bar, a percentage behind a tqdm bar.

    Nothing where the trainer shows no bar (enable_progress_bar=false, or a process other than the first).
    """

    def __init__(self) -> None:
        self.task: TaskID | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bar = trainer.progress_bar_callback
        assert isinstance(pl_module, Sampling | Inverting)
        if bar is None or not trainer.is_global_zero:
            return
        if isinstance(bar, RichProgressBar):
            pl_module.progress = lambda fraction: self._rich(bar, fraction)
        elif isinstance(bar, TQDMProgressBar):
            pl_module.progress = lambda fraction: bar.predict_progress_bar.set_postfix_str(f"{fraction:.0%} of batch")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Sampling | Inverting)
        pl_module.progress = None

    def _rich(self, bar: RichProgressBar, fraction: float) -> None:
        if bar.progress is None:
            return
        if self.task is None:  # only now does Lightning's own line stand above
            self.task = bar.progress.add_task("  % of the batch", total=100)
        bar.progress.update(self.task, completed=100 * fraction)
        bar.refresh()
