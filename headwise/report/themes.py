"""The colours of the report: one palette for light and one for dark, shared by the page and its charts."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Theme:
    """Colours as hex strings. Text on paper has a contrast of at least 4.5 to 1, marks of at least 3 to 1 (WCAG 2.2)."""

    name: str
    paper: str
    card: str
    ink: str
    muted: str
    rule: str
    chosen: str
    control: str
    third: str
    fourth: str
    gain: str
    loss: str

    @property
    def css(self) -> str:
        """The colours as custom properties of the page."""
        return " ".join(f"--{name}: {value};" for name, value in asdict(self).items() if name != "name")

    def arm(self, arm: str) -> str:
        """The colour of an arm, the same in every chart: the chosen layers, the control, and the two further controls."""
        return {"top": self.chosen, "bottom": self.control, "random": self.third, "all": self.fourth}.get(arm, self.muted)


LIGHT = Theme(
    name="light",
    paper="#f6f5f2",
    card="#ffffff",
    ink="#1d1f24",
    muted="#5c606b",
    rule="#dcdad4",
    chosen="#c2410c",
    control="#2563a8",
    third="#6b7280",
    fourth="#7c3f9e",
    gain="#15803d",
    loss="#b91c1c",
)
DARK = Theme(
    name="dark",
    paper="#121418",
    card="#1b1e24",
    ink="#e9e8e4",
    muted="#a2a6b0",
    rule="#343840",
    chosen="#ff8a4c",
    control="#6fb1f5",
    third="#9aa1ad",
    fourth="#c793e8",
    gain="#5cc98a",
    loss="#ff7b7b",
)
