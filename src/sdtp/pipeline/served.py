"""The model that MLflow serves: a trained pruner around the language model it was trained for.

MLflow copies this file into every registered version and runs it when the version is loaded. It needs nothing of this
package but `sdtp.pruning`, which is copied beside it. The language model itself is not copied: the version names it,
and it is read at the first prediction, so that loading is quick.
"""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

NEW_TOKENS = 64


class ServedPruner(PythonModel):
    """Generates from prompts under the pruner.

    `mlflow.pyfunc.load_model(uri, model_config={...})` may replace what the version says of the language model: `model`
    (folder or hub id), `revision`, `dtype`, `attention`, `trust_remote_code`.

    Attributes:
        pruner: the TokenPruner, for use with a model of one's own.
    """

    # MLflow's server answers each request in a thread of its own, and one pruner at a time can be on a model.
    _turn = threading.Lock()

    def load_context(self, context: PythonModelContext) -> None:
        """Called by MLflow: reads the pruner."""
        from sdtp.pruning.pruner import TokenPruner

        self.pruner = TokenPruner.from_pretrained(Path(context.artifacts["pruner"]))
        self._config = dict(context.model_config)
        self._loaded: tuple[Any, Any] | None = None

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generates greedily from each row's `prompt`: one user message in the model's chat template, if it has one.

        params: `max_new_tokens`.

        Returns a row a prompt: `text`, `prompt_tokens`, and `kept_tokens`, those that reach the last layers.
        """
        with self._turn:
            return self._generate(model_input["prompt"], (params or {}).get("max_new_tokens", NEW_TOKENS))

    def _generate(self, prompts: Iterable[str], new_tokens: int) -> pd.DataFrame:
        import torch

        model, tokenizer = self._model_and_tokenizer()
        rows = []
        for prompt in prompts:
            if tokenizer.chat_template:
                chat = [{"role": "user", "content": prompt}]
                inputs = tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            else:
                inputs = tokenizer(prompt, return_tensors="pt")
            inputs = inputs.to(model.device)
            with torch.no_grad(), self.pruner(model) as trace:
                output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            length = inputs["input_ids"].shape[1]
            kept = int((trace.kept[-1] >= 0).sum())
            text = tokenizer.decode(output[0, length:], skip_special_tokens=True)
            rows.append({"text": text, "prompt_tokens": length, "kept_tokens": kept})
        return pd.DataFrame(rows, columns=["text", "prompt_tokens", "kept_tokens"])

    def _model_and_tokenizer(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            named = {key: self._config[key] for key in ("revision", "trust_remote_code")}
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = self._config["dtype"]
            if dtype == "auto":  # as the run's steps take it; for transformers it is the checkpoint's own
                dtype = torch.bfloat16 if device == "cuda" else torch.float32
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._config["model"],
                dtype=dtype,
                attn_implementation=self._config["attention"],
                use_safetensors=True,
                **named,
            )
            model.to(device).eval()
            self._loaded = model, AutoTokenizer.from_pretrained(self._config["model"], **named)
        return self._loaded


set_model(ServedPruner())
