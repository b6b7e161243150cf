"""What comes after training: `from u2mamba.inference import load_model, Predictor` (loads PyTorch when first used)."""

__all__ = ["Predictor", "load_model"]


def __getattr__(name: str):  # lazy, because evaluating saved maps does without PyTorch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from u2mamba.inference import predictor

    return getattr(predictor, name)
