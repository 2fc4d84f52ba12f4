"""How long updates take, by the operations and launches that memory.py counts."""

# Half-precision peaks that NVIDIA publishes, 1e12 operations a second, dense, sums in float32.
CARDS = {"T4": 65, "RTX 4060 Ti": 44, "RTX 4080": 97, "A100": 312, "H200": 989}
UTILISATION = 0.4  # of these, assumed; what was measured is in bench/README.md
LAUNCH = 38e-6  # seconds of a processor to launch a kernel; chosen so that most of gpu.csv comes out


def seconds(operations: dict, launches: dict, peak: float) -> float:
    """Of an update, on a card of that peak; less on a slow one, where launches hide behind computing."""
    computing = sum(operations.values()) / (peak * UTILISATION)
    return computing + 1e6 * sum(launches.values()) * LAUNCH


def hours(operations: dict, launches: dict, updates: int) -> dict[str, float]:
    """Of so many updates on each of CARDS, without evaluations."""
    return {card: updates * seconds(operations, launches, peak) / 3600 for card, peak in CARDS.items()}


def describe(operations: dict, launches: dict, updates: int) -> str:
    """A line for each card."""
    lines = []
    for card, found in hours(operations, launches, updates).items():
        lines.append(
            f"{card:18}{found:6.1f} hours of updates at {UTILISATION:.0%} of its half-precision peak"
        )
    lines.append(f"{'':18}and {1e6 * LAUNCH:.0f} microseconds a launch")
    return "\n".join(lines)
