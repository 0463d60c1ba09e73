"""What can be chosen for a benchmark on the command line, and the command that repeats it."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_THREADS = 2
DEFAULT_IMAGE_SIZE_PX = 224
WEIGHT_SEED = 0


@dataclass(frozen=True)
class Settings:
    """The choices; None stands for the benchmark's own.

    Attributes:
        threads: CPU threads of each runtime in a comparison.
        duration_s: time budget of one comparison of one model.
        models: FAMILY-VARIANT names.
        batches: batch sizes.
        image_size: pixels of the square input.
        quick: as short as possible, to see that it works; the figures mean nothing.
    """

    threads: int = DEFAULT_THREADS
    duration_s: float | None = None
    models: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    image_size: int = DEFAULT_IMAGE_SIZE_PX
    quick: bool = False

    def command(self, benchmark: str) -> str:
        """The command line that runs a benchmark with these choices."""
        words = ["python -m benchmarks", benchmark]
        if self.models is not None:
            words.append(f"--models {','.join(self.models)}")
        if self.batches is not None:
            words.append(f"--batch {','.join(map(str, self.batches))}")
        if self.image_size != DEFAULT_IMAGE_SIZE_PX:
            words.append(f"--image-size {self.image_size}")
        if self.threads != DEFAULT_THREADS:
            words.append(f"--threads {self.threads}")
        if self.duration_s is not None:
            words.append(f"--duration {self.duration_s:g}")
        if self.quick:
            words.append("--quick")
        return " ".join(words)
