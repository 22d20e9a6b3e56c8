"""Show the progress of tasks: as a bar on a terminal, as plain lines in a file."""

import math
import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn

from gatera_lightning.terminal.printing import SafeConsole, print_text


class ProgressDisplay:
    """The progress of one task, and of a second one that interrupts it.

    On a terminal there is one bar at the bottom for each task. Elsewhere, lines without control characters
    are printed.
    """

    def __init__(self) -> None:
        console = SafeConsole(highlight=False)
        # FORCE_COLOR makes a console interactive even if its output is a file.
        self._on_terminal = sys.stdout.isatty() and console.is_interactive
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # takes the width that the other columns leave
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=math.inf,  # a step may take an hour; rich looks at its last 1,000 updates
            redirect_stderr=sys.stderr.isatty(),
            disable=not self._on_terminal,
        )
        self._tenths: dict[TaskID, int] = {}
        self._progress.start()

    @property
    def num_tasks(self) -> int:
        """The number of tasks that are not finished."""
        return len(self._progress.tasks)

    @property
    def first_task(self) -> Task:
        """The task that was started first."""
        return self._progress.tasks[0]

    @property
    def current_task(self) -> Task:
        """The task that was started last."""
        return self._progress.tasks[-1]

    def start_task(self, name: str, total: float, completed: int = 0) -> None:
        """Start a task.

        Args:
            name: What the unit of the task is called, such as ``step``.
            total: The number of units; infinite if unknown.
            completed: How many units are already done.
        """
        self._progress.add_task(
            name, total=total if math.isfinite(total) else None, completed=completed, figures=""
        )

    def remove_current_task(self) -> None:
        """Remove the task that was started last."""
        self._progress.remove_task(self.current_task.id)

    def set_completed(self, completed: int) -> None:
        """Set how many units of the first task are done."""
        self._progress.update(self.first_task.id, completed=completed)

    def advance(self) -> None:
        """Count one more unit of the current task."""
        self._progress.advance(self.current_task.id)

    def show(self, task: Task, figures: list[str]) -> None:
        """Update the figures beside a bar, or print a line with them; the remaining time is added."""
        if not task.finished and task.time_remaining is not None:
            figures = [*figures, f"ETA {_format_time(int(task.time_remaining))}"]
        self._progress.update(task.id, figures="  ".join(figures))
        if not self._on_terminal and self._reached_a_tenth(task):
            self.print_line(task, figures)

    def _reached_a_tenth(self, task: Task) -> bool:
        """Whether a task has come to another tenth since its last line: a log file gets few lines."""
        if not task.total or task.finished:
            return True
        tenth = int(10 * task.completed // task.total)
        before = self._tenths.get(task.id, -1)
        self._tenths[task.id] = tenth
        return tenth > before

    def print_line(self, task: Task, figures: list[str]) -> None:
        """Print the position of a task and figures as a line that stays."""
        total = "" if task.total is None else f"/{int(task.total)}"
        position = f"{task.description} {int(task.completed)}{total}"
        # While a bar is shown, rich prints this above it. Flushed, because somebody may be following a log
        # file.
        print_text("  ".join([position, *figures]))

    def close(self) -> None:
        """Remove the bars and restore the terminal."""
        self._progress.stop()


def _format_time(seconds: int) -> str:
    """3:20 or 2:03:20."""
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
