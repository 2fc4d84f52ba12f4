"""How long updates take, by the operations, launches and moved bytes that memory.py counts."""

from dataclasses import dataclass, field

# Half-precision peaks that NVIDIA publishes, 1e12 operations a second, dense, sums in float32.
CARDS = {"T4": 65, "RTX 4060 Ti": 44, "RTX 4080": 97, "A100": 312, "H200": 989}
UTILISATION = 0.4  # of these, assumed; what was measured is in bench/README.md
LAUNCH = 38e-6  # seconds of a processor to launch a kernel; chosen so that most of gpu.csv comes out
MOVED = 12  # GB a second between card and host, half of what PCIe 4.0 can; it suits gpu.csv's three rows


@dataclass
class Work:
    """What one update does, by phase."""

    operations: dict = field(default_factory=dict)  # 1e12
    launches: dict = field(default_factory=dict)  # 1e6
    moved: dict = field(default_factory=dict)  # GB between card and host, with --offload


def seconds(work: Work, peak: float) -> float:
    """Of an update, on a card of that peak; less on a slow one, where launches hide behind computing."""
    computing = sum(work.operations.values()) / (peak * UTILISATION)
    launching = 1e6 * sum(work.launches.values()) * LAUNCH
    return computing + launching + sum(work.moved.values()) / MOVED


def hours(work: Work, updates: int) -> dict[str, float]:
    """Of so many updates on each of CARDS, without evaluations."""
    return {card: updates * seconds(work, peak) / 3600 for card, peak in CARDS.items()}


def describe(work: Work, updates: int) -> str:
    """Lines of what it is, of the hours on each card, and of what these assume."""
    lines = []
    for name, count in work.operations.items():
        launches = f"{work.launches[name]:.2f} million launches"
        lines.append(f"{name:18}{count:9.2f} TFLOP an update, {launches}")
    lines.append(f"{'to the host, back':18}{sum(work.moved.values()):9.2f} GB an update")
    for card, found in hours(work, updates).items():
        lines.append(
            f"{card:18}{found:6.1f} hours of updates at {UTILISATION:.0%} of its half-precision peak"
        )
    lines.append(f"{'':18}and {1e6 * LAUNCH:.0f} microseconds a launch, {MOVED} GB a second to the host")
    return "\n".join(lines)
