"""All methods of `bitnet compare`."""

from bitnet.benchmarks.compare.method import Method
from bitnet.errors import BitNetError


def registry() -> dict[str, Method]:
    """All methods by name, in the order of the table."""
    from bitnet.benchmarks.compare import gguf_methods, gptq, own, torchao_methods

    methods = [*own.FLOATS, *torchao_methods.METHODS, *gptq.METHODS, *gguf_methods.METHODS, *own.BITNETS]
    return {method.name: method for method in methods}


def choose(names: str | None) -> list[Method]:
    """The methods of a comma-separated list of names and families; all of them for None. Raises BitNetError."""
    known = registry()
    if names is None:
        return list(known.values())
    families = {method.family for method in known.values()}
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known and name not in families:
            raise BitNetError(
                f"methods: got '{name}', expected some of {', '.join(known)}, or the families "
                f"{', '.join(sorted(families))}"
            )
    if not asked:
        raise BitNetError(f"methods: got none, expected some of {', '.join(known)}")
    return [method for method in known.values() if method.name in asked or method.family in asked]
