from fastres.backends.base import Backend, declare
declare(Backend("cpu", ("cpu",), why_not=lambda: "fastres._cpu was not built", fallback=("aten",)))
