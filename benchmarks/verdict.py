"""What a long run found, beside what was asked of it: a table, and an exit code."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Verdict:
    """Figures and their bars.

    Attributes:
        title: Above the table.
        failed: Names of the figures that are not within their bar.
    """

    title: str
    failed: list[str] = field(default_factory=list[str])
    _rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def most(self, name: str, value: float, bar: float, unit: str = "") -> None:
        """A figure that may not be larger than its bar."""
        self._add(name, value, f"≤ {bar:g}", value <= bar, unit)

    def least(self, name: str, value: float, bar: float, unit: str = "") -> None:
        """A figure that may not be smaller than its bar."""
        self._add(name, value, f"≥ {bar:g}", value >= bar, unit)

    def exactly(self, name: str, value: float, bar: float, unit: str = "") -> None:
        """A figure that must be its bar."""
        self._add(name, value, f"= {bar:g}", value == bar, unit)

    def tell(self, name: str, value: float, unit: str = "") -> None:
        """A figure without a bar: it is not judged."""
        self._rows.append((name, _number(value, unit), "", ""))

    def show(self, console: Console) -> bool:
        """Print the table, and what failed → whether all is well."""
        table = Table("figure", "measured", "bar", "", title=self.title, title_justify="left")
        for row in self._rows:
            table.add_row(*row)
        console.print(table)
        if self.failed:
            console.print(f"[red]failed:[/] {'; '.join(self.failed)}")
        return not self.failed

    def _add(self, name: str, value: float, bar: str, ok: bool, unit: str) -> None:
        mark = "[green]pass[/]" if ok else "[red]FAIL[/]"
        self._rows.append((name, _number(value, unit), f"{bar} {unit}".rstrip(), mark))
        if not ok:
            self.failed.append(f"{name} {_number(value, unit)}, expected {bar}")


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()
