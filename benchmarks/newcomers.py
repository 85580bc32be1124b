"""What newcomers ask: is the object that answers it in an environment's corpus, and among the passages that the model is shown?

    .venv/bin/python benchmarks/newcomers.py --env dev
    .venv/bin/python benchmarks/newcomers.py --env dev --ask         also what the deployed champion answers, and what a quote would

The 90 questions of `newcomers.jsonl` are about the packages of the sample's corpus: 30 are ours, 60 were written by a language model
that knew nothing of which documents dev holds, and that looked for the objects afterwards. None of them is learned, and none decides
what dev holds; but 29 ask for an object that a question of `data/` keeps there in any case, so the others are counted apart. That the
sample is as large as it is was chosen by how many of them it can answer. An answer is right if it names the object first.
"""
import argparse, json, sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from llmops_ref.assistant.chain import as_retriever, lowest_cosine, make_chain
from llmops_ref.core.config import begin_process, load_config
from llmops_ref.core.scoring import names_gold
from llmops_ref.core.significance import said_share
from llmops_ref.core.workspace import open_workspace
from llmops_ref.documents.prominence import ask_first
from llmops_ref.release.champion import open_champion
from llmops_ref.search.published import open_index

DATA = Path(__file__).parent.parent / "data"


def show(what: str, right) -> None: print(f"{what}: {int(sum(right))}, {said_share(sum(right) / len(right), len(right))}")


def answers(name: str, ask, questions: pd.DataFrame) -> None:
    "Ask all, and print how many answers are right, and how many a refusal."
    replies = [ask(question) for question in questions.question]
    show(f"{name}, right", [bool(names_gold(reply["answer"], gold)) for reply, gold in zip(replies, questions.gold)])
    show(f"{name}, refused", [reply["refused"] for reply in replies])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="dev")
    parser.add_argument("--ask", action="store_true", help="ask the champion, too; some four minutes on two cores")
    given = parser.parse_args()
    begin_process()
    ws = open_workspace(load_config(given.env))
    config, documents, index = ws.config, ws.read("documents"), open_index(ws)
    questions = pd.DataFrame(json.loads(line) for line in (Path(__file__).parent / "newcomers.jsonl").open(encoding="utf-8"))
    there = [bool(set(documents.id) & set(gold)) for gold in questions.gold]
    asked = ask_first(index, questions, config.retrieval_k)
    for q in asked.assign(there=there)[~asked.right].itertuples():
        print(f"{'not found' if q.there else 'not there'}  {q.question}  ->  {', '.join(q.shown)}")
    print(f"\n{len(documents):,} documents, {len(ws.read('chunks')):,} chunks")
    show("in the corpus", there)
    files = [DATA / f"{name}.jsonl" for name in ("questions", "first_questions")]
    ours = [json.loads(line)["gold"] for path in files for line in path.open(encoding="utf-8")]
    kept = {document for gold in ours for document in gold}
    show("the same, of what no question of ours keeps there", [found for found, gold in zip(there, questions.gold) if not kept & set(gold)])
    show(f"among {config.retrieval_k} passages", asked.right)
    if not given.ask: return
    retriever = as_retriever(index, config.retrieval_k, config.retrieval, config.retrieval_candidates)
    chain = make_chain(None, "{{quote}}", retriever, config.passage_words, lowest_cosine(config), config.question_words)
    answers("a quote", lambda question: chain.invoke(dict(question=question)), questions)
    with open_champion(ws) as ask: answers("the champion", ask, questions)


if __name__ == "__main__": main()
