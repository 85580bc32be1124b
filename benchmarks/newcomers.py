"""What newcomers ask: is the object that answers it in an environment's corpus, and among the passages that the model is shown?

    .venv/bin/python benchmarks/newcomers.py --env dev

The 90 questions of `newcomers.jsonl` are about the packages of the sample's corpus: 30 are ours, 60 were written by a reader who did
not know which documents dev holds, and who found the objects afterwards. No question decides what dev holds, and none is learned;
that the sample is as large as it is was chosen by how many of them it can answer. (Those of `data/first_questions.jsonl` are kept in
dev in any case, so they say nothing of a stranger's question.)
"""
import argparse, json, sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from llmops_ref.core.config import load_config
from llmops_ref.core.significance import said_share
from llmops_ref.core.workspace import open_workspace
from llmops_ref.documents.prominence import ask_first
from llmops_ref.search.published import open_index


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="dev")
    ws = open_workspace(load_config(parser.parse_args().env))
    documents, index = ws.read("documents"), open_index(ws)
    known = set(documents.id)
    questions = pd.DataFrame(json.loads(line) for line in (Path(__file__).parent / "newcomers.jsonl").open(encoding="utf-8"))
    asked = ask_first(index, questions, ws.config.retrieval_k)
    asked["there"] = [bool(known & set(gold)) for gold in asked.gold]
    for q in asked[~asked.right].itertuples():
        print(f"{'not found' if q.there else 'not there'}  {q.question}  ->  {', '.join(q.shown)}")
    print(f"\n{len(documents):,} documents, {len(ws.read('chunks')):,} chunks")
    for what in ("there", "right"):
        print(f"{'in the corpus' if what == 'there' else f'among {ws.config.retrieval_k} passages'}:"
              f" {int(asked[what].sum())} of {len(asked)}, {said_share(asked[what].mean(), len(asked))}")


if __name__ == "__main__": main()
