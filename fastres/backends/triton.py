from fastres.backends.base import Backend, declare

declare(Backend("triton", ("cuda",), why_not=lambda: "no triton", fallback=("aten",)))
