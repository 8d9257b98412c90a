"""``mbn backends``: the known backends, and the reason why one cannot be used here. A broken one hides no other."""

from mbn.commands.output import console, essence, print_filled, table
from mbn.registry import get_backend, known_backends, misnamed_entry_points


def show() -> None:
    """Print the usable backends with their capabilities, and the others with the reason."""
    usable = table("backend", "version", "devices", "dtypes", "can", "from")
    others = table("backend", "cannot be used here", "from")
    for name, known in known_backends().items():
        try:
            row = _row(name)
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and the next one may work
            others.add_row(name, essence(str(error)), known.source)
        else:
            usable.add_row(name, *row, known.source)
    for name, known in misnamed_entry_points().items():
        others.add_row(name, "its name is not made of letters, digits, '_' and '-'", known.source)
    print_filled(console(), usable, others)


def _row(name: str) -> list[str]:
    backend = get_backend(name)
    can = backend.capabilities
    abilities = [name for name, able in can._asdict().items() if able is True]
    return [backend.version, "\n".join(can.devices), " ".join(sorted(can.dtypes)), " ".join(abilities)]
