"""Label-conditional generative radiance fields: `graf.load` opens what train.py has trained.

The names are looked up when they are asked for, so that `import graf` alone imports neither torch nor anything else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graf.app.loading import Renderer as Renderer
    from graf.app.loading import load as load

__version__ = "0.1.0"
__all__ = ["Renderer", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from graf.app import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
