"""Networks: cleaning rules, round trips, foreign layouts, and one line for every mistake."""

from __future__ import annotations

import gzip
import io
import os

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad

from perturbzoo.errors import PerturbZooError
from perturbzoo.grn import GeneRegulatoryNetwork
from perturbzoo.grn.network_tables import read_network_table

GENES = ("C", "A", "B", "D")
TABLE = pd.DataFrame(
    {
        "regulator": ["A", "B", "A", "C"],
        "target": ["B", "C", "C", "A"],
        "weight": [2.0, -0.5, 1.0, 3.0],
        "sign": [1, -1, 0, 1],
        "probability": [0.25, 1.0, 0.5, 0.0],
    }
)
# by hand: rows are targets, columns regulators, both in the order C, A, B, D
MATRIX = np.array([[0, 1.0, -0.5, 0], [3.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 0]])


@pytest.fixture
def network() -> GeneRegulatoryNetwork:
    return GeneRegulatoryNetwork.from_edges(TABLE, GENES)


def triples(network: GeneRegulatoryNetwork) -> set[tuple]:
    return set(network.edges.itertuples(index=False, name=None))


def assert_same(one: GeneRegulatoryNetwork, other: GeneRegulatoryNetwork) -> None:
    assert one.genes == other.genes
    assert triples(one) == triples(other)


def test_matrix_has_targets_in_rows(network):
    np.testing.assert_array_equal(network.matrix().toarray(), MATRIX)
    assert network.regulators == ("C", "A", "B")
    assert network.targets == ("C", "A", "B")
    assert repr(network) == "GeneRegulatoryNetwork(4 genes, 3 regulators, 4 edges, 1 of unknown sign)"


def test_signs_come_from_weights_and_strengths_take_the_sign():
    table = pd.DataFrame({"regulator": ["A", "A"], "target": ["B", "C"], "weight": [-2.0, 3.0]})
    assert GeneRegulatoryNetwork.from_edges(table).edges["sign"].tolist() == [-1, 1]
    assert GeneRegulatoryNetwork.from_edges(table.assign(weight=[2.0, 3.0], sign=[-1, 1])).weight.tolist() == [-2.0, 3.0]


@pytest.mark.parametrize(("unknown", "weight"), [("drop", None), ("activating", 1.0), ("repressing", -1.0)])
def test_resolving_signs(network, unknown, weight):
    resolved = network.resolve_signs(unknown)
    assert (resolved.sign != 0).all()
    assert resolved.matrix()[0, 1] == (weight or 0.0)
    assert len(resolved) == (3 if weight is None else 4)


def test_restrict_reorders_and_drops(network):
    small = network.restrict(["B", "X", "A"])
    assert small.genes == ("B", "X", "A")
    assert triples(small) == {("A", "B", 2.0, 1, 0.25)}


@pytest.mark.parametrize("name", ["edges.csv", "edges.csv.gz", "edges.tsv.csv", "edges.parquet"])
def test_files_round_trip(network, tmp_path, name):
    network.write(tmp_path / name)
    assert_same(GeneRegulatoryNetwork.read(tmp_path / name, GENES), network)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_anndata_round_trips_through_a_file(network, tmp_path):
    adata = AnnData(np.zeros((2, 5), dtype=np.float32), var=pd.DataFrame(index=["D", "B", "A", "E", "C"]))
    network.to_anndata(adata, "truth")
    adata.write_h5ad(tmp_path / "with.h5ad")
    back = GeneRegulatoryNetwork.from_anndata(read_h5ad(tmp_path / "with.h5ad"), "truth")
    assert back.genes == ("D", "B", "A", "E", "C")
    assert triples(back) == triples(network)


def test_foreign_varp_needs_an_orientation(network):
    adata = AnnData(np.zeros((2, 4), dtype=np.float32), var=pd.DataFrame(index=list(GENES)))
    adata.varp["W"] = MATRIX.T.copy()
    with pytest.raises(PerturbZooError, match="does not say its orientation"):
        GeneRegulatoryNetwork.from_anndata(adata, "W")
    back = GeneRegulatoryNetwork.from_anndata(adata, "W", orientation="regulator, target")
    np.testing.assert_array_equal(back.matrix().toarray(), MATRIX)
    with pytest.raises(PerturbZooError, match=r"varp\['w'\] is missing; did you mean 'W'"):
        GeneRegulatoryNetwork.from_anndata(adata, "w")


def test_networkx_round_trips(network):
    graph = network.to_networkx()
    assert graph["A"]["B"] == {"weight": 2.0, "sign": 1, "probability": 0.25}
    assert_same(GeneRegulatoryNetwork.from_networkx(graph), network)
    bare = GeneRegulatoryNetwork.from_networkx(networkx.DiGraph([("x", "y")]))
    assert triples(bare) == {("x", "y", 1.0, 0, 1.0)}
    with pytest.raises(PerturbZooError, match="undirected"):
        GeneRegulatoryNetwork.from_networkx(graph.to_undirected())


def test_pyg_round_trips(network):
    data = network.to_pyg()
    # messages flow from row 0 to row 1: D gets none, B gets A's
    messages = torch.zeros(4).index_add(
        0, data.edge_index[1], data.edge_weight * torch.tensor([1.0, 10, 100, 1000])[data.edge_index[0]]
    )
    np.testing.assert_allclose(messages, MATRIX @ [1.0, 10, 100, 1000])
    assert_same(GeneRegulatoryNetwork.from_pyg(data), network)
    data.gene = None
    with pytest.raises(PerturbZooError, match="do not name their nodes"):
        GeneRegulatoryNetwork.from_pyg(data)


def test_state_survives_a_checkpoint(network):
    buffer = io.BytesIO()
    torch.save(network.to_state(), buffer)
    buffer.seek(0)
    assert_same(GeneRegulatoryNetwork.from_state(torch.load(buffer, weights_only=True)), network)
    with pytest.raises(PerturbZooError, match="not a network"):
        GeneRegulatoryNetwork.from_state({"genes": ["A"]})


def table(*rows, columns=("regulator", "target", "weight")) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


TWICE = table(("A", "B", 1.0), ("A", "B", 3.0), ("C", "B", 1.0))
BOTH = table(("A", "B", 1.0), ("A", "B", -3.0), ("C", "B", 1.0))


@pytest.mark.parametrize(("rule", "weight"), [("strongest", 3.0), ("sum", 4.0), ("mean", 2.0)])
def test_duplicates(rule, weight):
    network = GeneRegulatoryNetwork.from_edges(TWICE, duplicates=rule)
    assert triples(network) == {("A", "B", weight, 1, 1.0), ("C", "B", 1.0, 1, 1.0)}


def test_contradictions():
    unknown = GeneRegulatoryNetwork.from_edges(BOTH, duplicates="strongest", contradictory="unknown")
    assert triples(unknown) == {("A", "B", 3.0, 0, 1.0), ("C", "B", 1.0, 1, 1.0)}
    assert triples(GeneRegulatoryNetwork.from_edges(BOTH, contradictory="drop")) == {("C", "B", 1.0, 1, 1.0)}
    # one source knows the sign, another does not: no contradiction
    half = table(("A", "B", 1.0, -1), ("A", "B", 2.0, 0), columns=("regulator", "target", "weight", "sign"))
    assert triples(GeneRegulatoryNetwork.from_edges(half, duplicates="strongest")) == {("A", "B", -2.0, -1, 1.0)}


def test_self_loops_and_outside_genes_on_request():
    loops = table(("A", "A", 1.0), ("A", "B", 1.0))
    assert len(GeneRegulatoryNetwork.from_edges(loops, self_loops="keep")) == 2
    assert len(GeneRegulatoryNetwork.from_edges(loops, self_loops="drop")) == 1
    assert triples(GeneRegulatoryNetwork.from_edges(TWICE, ["B", "C"], outside="drop")) == {("C", "B", 1.0, 1, 1.0)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GeneRegulatoryNetwork.from_edges(TWICE, ["a", "C"]),
            "2 of its genes are not in the data: A, B; did you mean 'a'",
        ),
        (lambda: GeneRegulatoryNetwork.from_edges(TWICE, ["x"], outside="drop"), "none of its 3 genes is in the data"),
        (lambda: GeneRegulatoryNetwork.from_edges(TWICE), "1 edges come more than once: A -> B; duplicates="),
        (
            lambda: GeneRegulatoryNetwork.from_edges(BOTH, duplicates="sum"),
            "1 edges are both activating and repressing: A -> B",
        ),
        (lambda: GeneRegulatoryNetwork.from_edges(table(("A", "A", 1))), "1 self loops: A; self_loops='drop' or 'keep'"),
        (lambda: GeneRegulatoryNetwork.from_edges(table(("A", "B", 0.0))), "weight 0 is no edge.*A -> B"),
        (lambda: GeneRegulatoryNetwork.from_edges(table(("A", "B", "high"))), "weight of A -> B is 'high', no finite number"),
        (lambda: GeneRegulatoryNetwork.from_edges(table(("A", "B", np.inf))), "no finite number"),
        (lambda: GeneRegulatoryNetwork.from_edges(table(("A", None, 1.0))), "1 of 1 edges lack the name"),
        (
            lambda: GeneRegulatoryNetwork.from_edges(table(("A", "B"), columns=("tf", "target"))),
            "no column regulator; .* tf, target",
        ),
        (lambda: GeneRegulatoryNetwork.from_edges(TWICE.assign(probability=1.5)), "probability must lie in"),
        (lambda: GeneRegulatoryNetwork.from_edges(BOTH.assign(sign=1)), "contradicts the sign 1"),
        (lambda: GeneRegulatoryNetwork.from_edges(TWICE, ["A", "B", "B", "C"], duplicates="sum"), "named twice: B"),
        (lambda: GeneRegulatoryNetwork(("A",), [0], [3], [1.0], [1], [1.0]), "points outside its 1 genes"),
        (lambda: GeneRegulatoryNetwork(("A", "B"), [0], [1], [-1.0], [1], [1.0]), "contradicts its sign"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(PerturbZooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


SCENIC = (
    ",,Enrichment,Enrichment,Enrichment,Enrichment\n"
    ",,AUC,Context,TargetGenes,RankAtMax\n"
    "TF,MotifID,,,,\n"
    "\"A\",m1,0.1,\"frozenset({'activating', 'weight>75.0%'})\",\"[('B', 2.0), ('C', 0.5)]\",10\n"
    "\"A\",m2,0.1,\"frozenset({'activating', 'top5perTarget'})\",\"[('C', 1.5)]\",10\n"
    '"B",m3,0.1,"frozenset({\'repressing\'})","[(\'C\', 0.25)]",10\n'
)
LAYOUTS = {
    "trrust": ("trrust.tsv", "A\tB\tActivation\t1;2\nA\tC\tUnknown\t3\nB\tC\tRepression\t4\n", (1, 1, -1)),
    "dorothea": ("d.tsv", "tf\tconfidence\ttarget\tmor\nA\tA\tB\t1.0\nA\tC\tC\t0\nB\tA\tC\t-1.0\n", (1, 1, -1)),
    "collectri": ("c.csv", "source,target,weight,PMID\nA,B,1,7\nA,C,1,8\nB,C,-1,9\n", (1, 1, -1)),
    "collectri of omnipath": (
        "o.csv",
        "source_genesymbol,target_genesymbol,is_stimulation,is_inhibition\nA,B,True,False\nA,C,False,False\nB,C,False,True\n",
        (1, 1, -1),
    ),
    "celloracle": (
        "base.csv",
        ",peak_id,gene_short_name,A,B\n0,chr1_1_9,B,1.0,0.0\n1,chr1_11_19,C,1.0,1.0\n2,chr2_1_9,C,1.0,0.0\n",
        (1, 1, 1),
    ),
    "scenic": ("reg.csv", SCENIC, (2.0, 1.5, -0.25)),
    "regulons": ("reg.gmt", "A(+)\tx\tB\tC\nB(-)\tx\tscore=3\tC\n", (1, 1, -1)),
    "adjacencies": ("adj.tsv", "TF\ttarget\timportance\nA\tB\t9.5\nA\tC\t2\nB\tC\t1\n", (9.5, 2, 1)),
    "names only": ("n.csv", "from,to\nA,B\nA,C\nB,C\n", (1, 1, 1)),
}
SIGNS = {
    "collectri": (1, 1, -1),
    "celloracle": (0, 0, 0),
    "scenic": (1, 1, -1),
    "regulons": (1, 1, -1),
    "adjacencies": (0, 0, 0),
    "names only": (0, 0, 0),
}


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, explicit):
    """All describe A -> B, A -> C, B -> C; the sign of A -> C is unknown where the layout can say so."""
    file, text, weights = LAYOUTS[layout]
    path = tmp_path / (file + ".gz")
    path.write_bytes(gzip.compress(text.encode()))
    named = layout.split()[0] if explicit and layout not in ("adjacencies", "names only") else "edges" if explicit else "auto"
    edges = read_network_table(path, named)
    network = GeneRegulatoryNetwork.from_edges(edges)
    signs = SIGNS.get(layout, (1, 0, -1))
    pairs = [("A", "B"), ("A", "C"), ("B", "C")]
    assert triples(network) == {(*pair, weight, sign, 1.0) for pair, weight, sign in zip(pairs, weights, signs, strict=True)}


@pytest.mark.parametrize(
    ("file", "text", "layout", "message"),
    [
        ("x.csv", "gene,score\nA,1\n", "auto", "no column of regulators"),
        ("x.csv", "tf,target,weight\nA,B,strong\n", "auto", "column 'weight' holds 'strong'"),
        ("x.csv", "tf,target\n,B\n", "auto", "no row names both"),
        ("x.csv", "tf,target\nA,B\n", "scenicc", "did you mean 'scenic'"),
        ("x.csv", "tf,target\nA,B\n", "scenic", "no column TargetGenes"),
        ("x.tsv", "A\tB\tperhaps\t1\n", "trrust", "not TRRUST's layout"),
        ("x.csv", "peak_id,gene_short_name,A\np,B,0.7\n", "auto", "holds 0 and 1 in one column for each TF"),
        ("x.csv", SCENIC.replace("('C', 1.5)", "'C'"), "auto", "TargetGenes of A is not a list"),
        ("x.gmt", "A(+)\tB\n", "auto", "line 1: a line of regulons"),
    ],
)
def test_layouts_with_mistakes(tmp_path, file, text, layout, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(PerturbZooError, match=message):
        read_network_table(tmp_path / file, layout)


DATA = os.environ.get("PERTURBZOO_DATA")


@pytest.mark.skipif(not DATA, reason="PERTURBZOO_DATA is not set")
@pytest.mark.parametrize(
    ("file", "regulator", "target", "sign"),
    [
        ("dorothea_human_ABC.tsv.gz", "AHR", "CYP1A1", 1),
        ("trrust_human_from_dorothea.tsv.gz", "AHR", "CA9", -1),
        ("yeast_gold_standard_inferelator.tsv.gz", "YKL112W", "YBR248C", -1),
    ],
)
def test_real_networks(file, regulator, target, sign):
    options = {"self_loops": "drop", "duplicates": "strongest", "contradictory": "unknown"}
    network = GeneRegulatoryNetwork.read(f"{DATA}/networks/{file}", **options)
    edges = network.edges.set_index(["regulator", "target"])
    assert len(network) > 1000
    assert edges.loc[(regulator, target), "sign"] == sign
