"""Runs in an environment of its own with sae-dashboard: loads our Neuronpedia export with its classes, and compares with what its
own runner and converter write for the same SAE, rows and tokens.

    python -m venv dash && dash/bin/pip install --no-deps sae-dashboard eindex-callum 'dataclasses-json<0.7' marshmallow==3.26.1 \
        typing-inspect mypy-extensions neuronpedia python-dotenv    # beside sae-lens and its dependencies, and matplotlib
    DASHBOARD_PYTHON=dash/bin/python python -m pytest tests/test_neuronpedia.py -m slow

FOLDER holds `given.safetensors` (tokens, rows, lm_head, gain), `saelens/` (the SAE), `out/` (our export), `special.json`. Prints
one JSON line: field → largest difference, or whether it is the same.
"""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from neuronpedia.np_activation import Activation
from neuronpedia.np_feature import Feature, Logit
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.feature_data_generator import FeatureDataGenerator
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_dashboard.utils_fns import RollingCorrCoef
from sae_lens import SAE
from safetensors.torch import load_file

folder = Path(sys.argv[1])
given, special = load_file(folder / "given.safetensors"), set(json.loads((folder / "special.json").read_text()))
sae = SAE.load_from_disk(folder / "saelens")
hook = sae.cfg.metadata["hook_name"]
ours = [
    feature
    for path in sorted((folder / "out" / "sae_dashboard").glob("batch-*.json"), key=lambda p: int(p.stem[6:]))
    for feature in NeuronpediaDashboardBatch(**json.loads(path.read_text())).features
]


class Model:
    """A language model whose residual stream is the rows that were given."""

    W_U = (given["lm_head"] * given["gain"]).T
    W_U = W_U - W_U.mean(1, keepdim=True)
    hook_dict = {hook: None}  # noqa: RUF012
    cfg = SimpleNamespace(d_vocab=W_U.shape[1])


SIZE = 16
FeatureDataGenerator.get_model_acts = lambda self, i, tokens: {hook: given["rows"][i * SIZE : i * SIZE + len(tokens)]}
sequences = SequencesConfig(
    stack_mode="stack-all",
    buffer=None,
    compute_buffer=True,
    n_quantiles=5,
    top_acts_group_size=20,
    quantile_group_size=5,
)
parts = (sequences, ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3))
config = SaeVisConfig(
    hook_point=hook,
    features=list(range(sae.cfg.d_sae)),
    minibatch_size_features=64,
    minibatch_size_tokens=SIZE,
    device="cpu",
    dtype="float32",
    ignore_tokens=special,
    feature_centric_layout=SaeVisLayoutConfig(columns=[Column(*parts)]),
)
data = SaeVisRunner(config).run(encoder=sae, model=Model(), tokens=given["tokens"])
named = NeuronpediaRunnerConfig(sae_set="s", sae_path="", outputs_dir="", model_id="m", layer=0)
vocabulary = {i: str(i) for i in range(Model.cfg.d_vocab)}
converted = NeuronpediaConverter.convert_to_np_json(Model(), data, named, vocabulary)
theirs = NeuronpediaDashboardBatch(**json.loads(converted)).features

NUMBERS = [
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "neg_values",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_values",
]
NUMBERS += ["logits_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights"]
differences = {"features": len(ours) - len(theirs), "live": 0}
worst = lambda name, value: differences.__setitem__(name, max(differences.get(name, 0.0), value))  # noqa: E731


def largest(one, other):
    if len(one) != len(other):
        return float("inf")
    return max((abs(a - b) for a, b in zip(one, other)), default=0.0)


for a, b in zip(ours, theirs):
    assert a.feature_index == b.feature_index
    for name in NUMBERS:
        one, other = getattr(a, name), getattr(b, name)
        worst(name, largest(one, other) if isinstance(one, list) else abs(one - other))
    worst("neuron_alignment_indices", float(a.neuron_alignment_indices != b.neuron_alignment_indices))
    if not a.activations:
        worst("dead, theirs too", max(max(one.values) for one in b.activations))
        continue
    differences["live"] += 1
    tops = [[one for one in both.activations if one.bin_contains == -1] for both in (a, b)]
    peaks = [sorted(one.values[one.qualifying_token_index] for one in top) for top in tops]
    n = min(map(len, peaks))  # theirs shows silent rows too where fewer fire
    worst("top activations", largest(peaks[0][-n:], peaks[1][-n:]))
    worst("top, whole sequence", largest(tops[0][0].values, tops[1][0].values))
    worst("top, tokens", float(len(tops[0][0].tokens) != len(tops[1][0].tokens)))
    limits = [list(dict.fromkeys((o.bin_min, o.bin_max, o.bin_contains) for o in both.activations if o.bin_contains != -1))
              for both in (a, b)]  # fmt: skip
    common = {round(low, 2): (low, high, share) for low, high, share in limits[1]}
    for low, high, share in limits[0]:
        nearest = min(common.values(), key=lambda part: abs(part[0] - low))
        worst("intervals", max(abs(low - nearest[0]), abs(high - nearest[1])))
        worst("interval shares", abs(share - nearest[2]))
        chosen = [o for o in a.activations if o.bin_min == low and o.bin_contains == share]
        inside = [o.values[o.qualifying_token_index] for o in chosen]
        worst("examples outside their interval", max(max(low - v, v - high, 0) for v in inside))
# Its own correlations are of all rows, special ones too, and of a minibatch of latents: its class is asked of those that count.
counts = ~torch.isin(given["tokens"], torch.tensor(sorted(special)))
with torch.inference_mode():
    z = sae.encode(given["rows"][counts]).T.double()
    together = RollingCorrCoef(with_self=True, dtype=torch.float64)
    together.update(z, z)
    pearson, cosine = together.corrcoef()
for a in ours:
    for k, (other, found) in enumerate(zip(a.correlated_features_indices, a.correlated_features_pearson)):
        worst("pearson", abs(found - float(pearson[a.feature_index].sort(descending=True).values[k])))
        worst("cosine", abs(a.correlated_features_l1[k] - float(cosine[a.feature_index, other])))
differences["correlated"] = sum(bool(a.correlated_features_indices) for a in ours)

# What its database holds of an example and a latent, read by the client that Neuronpedia publishes.
read = lambda kind: [json.loads(line) for path in folder.glob(f"out/*/*/{kind}/batch-*.jsonl.gz")  # noqa: E731
                     for line in gzip.decompress(path.read_bytes()).splitlines()]  # fmt: skip
# It calls the table's column `layer` `source`, and knows no −1, which SAEDashboard gives the share of the strongest.
known = [line | {"source": line["layer"], "binContains": max(line["binContains"], 0)} for line in read("activations")]
examples = [Activation.from_np_db_json(line) for line in known]
for line in read("features"):
    logits = [Logit(token, value) for token, value in zip(line["pos_str"], line["pos_values"])]
    mine = [one for one in examples if one.index == int(line["index"])]
    Feature(line["modelId"], line["layer"], int(line["index"]), line["frac_nonzero"], logits, activations=mine)
    worst("its examples' maximum", abs(max((max(one.values) for one in mine), default=0.0) - line["maxActApprox"]))
differences["examples"] = len(examples)
print(json.dumps(differences))
