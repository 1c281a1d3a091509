"""Names and default places of models and memories."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
