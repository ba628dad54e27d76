"""SAEDashboard's Neuronpedia runner on a prepared folder, to be run by a Python that has `sae-dashboard` installed.

    PYTHON benchmarks/peers/run_sae_dashboard.py FOLDER...

`write_folder` of setting.py prepares each FOLDER: setting.json, weights.safetensors of a `GPT2LMHeadModel`, the SAE in
sae/, tokens.npy and texts.jsonl. Written there: features.json, the runner's own output batch by batch, with the
seconds of each. The runner is upstream's as it is; it is told only that a folder is a model's name, and which tokens
to read (it would draw them from a data set). All of this needs no network.
"""

import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}


def main() -> None:
    for folder in [Path(name).absolute() for name in sys.argv[1:]]:
        os.chdir(folder)
        run()


def run() -> None:
    """Run the prepared folder that is the working directory."""
    setting = json.loads(Path("setting.json").read_text())
    write_model(setting)
    dataset = Path("dataset")
    dataset.mkdir(exist_ok=True)
    (dataset / "train.jsonl").write_bytes(Path("texts.jsonl").read_bytes())

    names = (
        "numpy",
        "torch",
        "transformer_lens.loading_from_pretrained",
        "sae_dashboard.neuronpedia.neuronpedia_runner",
    )
    modules: list[Any] = [import_module(name) for name in names]
    numpy, torch, loading, neuronpedia = modules
    loading.get_official_model_name = lambda name: name
    tokens = torch.from_numpy(numpy.load("tokens.npy"))
    n_prompts, context = tokens.shape
    runner = neuronpedia.NeuronpediaRunner(
        neuronpedia.NeuronpediaRunnerConfig(
            sae_set="set",
            sae_path="sae",
            outputs_dir="out",
            from_local_sae=True,
            huggingface_dataset_path="dataset",
            n_prompts_total=n_prompts,
            n_tokens_in_prompt=context,
            n_features_at_a_time=setting["features_per_batch"],
            shuffle_tokens=False,
        )
    )
    drawn = runner.generate_tokens(runner.activations_store, setting["drawn_prompts"]).tolist()
    folder = Path(runner.cfg.outputs_dir)
    torch.save(tokens, folder / f"tokens_{n_prompts}.pt")
    features, seconds, processor_seconds = [], [], []
    for batch in range(setting["batches"]):
        runner.cfg.end_batch = batch
        runner.activations_store = None  # every run deletes it
        started, worked = time.perf_counter(), time.process_time()
        runner.run()  # batches that are there already are skipped
        seconds.append(time.perf_counter() - started)
        processor_seconds.append(time.process_time() - worked)
        features += json.loads((folder / f"batch-{batch}.json").read_text())["features"]
    Path("features.json").write_text(
        json.dumps(
            {
                "features": features,
                "seconds": seconds,
                "processor_seconds": processor_seconds,
                "drawn": drawn,
                "threads": torch.get_num_threads(),
                "versions": {
                    name: version(name)
                    for name in ("sae-dashboard", "sae-lens", "transformer-lens", "transformers", "torch")
                },
            }
        )
    )


def write_model(setting: dict) -> None:
    """The model and a tokenizer of words, as this environment's `transformers` writes them."""
    tokenizers, transformers, safetensors = map(import_module, ("tokenizers", "transformers", "safetensors.torch"))
    words = {word: index for index, word in enumerate(setting["words"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained("model")
    config = setting["model"]
    # TransformerLens reads the context length under its old name.
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, n_ctx=config["n_positions"]))
    missing, unexpected = model.load_state_dict(safetensors.load_file("weights.safetensors"), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights.safetensors is of another model: {missing}, {unexpected}")
    model.tie_weights()
    model.save_pretrained("model")


if __name__ == "__main__":
    main()
