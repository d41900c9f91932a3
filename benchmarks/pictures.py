"""How every picture is drawn and saved: without a display, and the same bytes from the same results."""

from pathlib import Path


def pyplot():
    """matplotlib.pyplot, imported when a picture is wanted."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "txl_kernels"
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, path: Path) -> None:
    """Saves as .svg or .png, and closes."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
