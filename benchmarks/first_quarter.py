"""The first quarter of an hour: what a stranger waits for, as whole processes, in medians.

    .venv/bin/python benchmarks/first_quarter.py                        the commands of every day, three times each
    .venv/bin/python benchmarks/first_quarter.py --cold                 also the life cycle from nothing, stage by stage
    .venv/bin/python benchmarks/first_quarter.py --tests                also `make test`
    .venv/bin/python benchmarks/first_quarter.py --beside ../other      the same in another checkout, in turns, with the ratio

The commands ask what dev has deployed, so dev must have run (`make run`). The life cycle runs in a clone of its own, and leaves
what is here alone. Each checkout uses its own `.venv`. Absolute seconds are those of this machine at this hour; the ratios hold
elsewhere, too.
"""
import argparse, contextlib, json, os, platform, resource, statistics, subprocess, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
QUESTION = "How do I log a metric?"
COMMANDS = {
    "llmops --help": ["--help"], "llmops status": ["status"], "llmops run, nothing to do": ["run", "--env", "dev"],
    "llmops search": ["search", QUESTION, "--env", "dev"], "llmops ask": ["ask", QUESTION, "--env", "dev"],
}


def timed(command: list, folder: Path, **environment) -> tuple[float, float]: # Seconds on the clock, and of processors
    "Run a command to its end, with all that it starts; a failure ends the benchmark."
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode: raise SystemExit(f"{' '.join(map(str, command))} in {folder} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def machine() -> str:
    "The machine, and how busy it is before we begin."
    try: cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor()
    try: wide = "with AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "without AVX-512"
    except OSError: wide = ""
    return f"{os.cpu_count()} cores, {cpu} {wide}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"


def show(name, runs: dict[str, list[tuple[float, float]]]):
    "One line: medians of wall and processor seconds for each checkout, and the ratio of the first two."
    medians = [tuple(statistics.median(part) for part in zip(*found)) for found in runs.values()]
    ratio = f"   {medians[0][0] / medians[1][0]:5.2f} x" if len(medians) > 1 else ""
    print(f"  {name:28}" + "".join(f"{wall:9.2f} s {cpu:8.2f} s cpu" for wall, cpu in medians) + ratio, flush=True)


@contextlib.contextmanager
def served(folder: Path):
    "Keep the assistant of dev up, as `llmops serve` does in another terminal."
    words = [folder / ".venv" / "bin" / "llmops", "serve", "--env", "dev"]
    server = subprocess.Popen(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        if " is at " not in server.stdout.readline(): raise SystemExit(f"`llmops serve` in {folder} serves nothing.")
        yield
    finally:
        server.terminate()
        server.wait()


def cold(folder: Path) -> tuple[float, dict[str, float]]: # Seconds, and those of each stage
    "The whole life cycle of dev in a fresh clone, with the environment of `folder`."
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        subprocess.run(["git", "clone", "-q", str(folder), str(clone)], check=True)
        wall, _ = timed([folder / ".venv" / "bin" / "llmops", "run", "--env", "dev"], clone, PYTHONPATH=str(clone))
        stages = json.loads((clone / "runs" / "dev" / "latest" / "run.json").read_text())["stages"]
        return wall, {stage["notebook"]: stage["seconds"] for stage in stages if stage["seconds"]}


def in_turns(folders: dict[str, Path], words: list[str], times: int) -> dict[str, list[tuple[float, float]]]:
    "A command in each checkout, in turns; the first turn warms up and does not count."
    runs = {where: [] for where in folders}
    for number in range(times + 1):
        for where, folder in folders.items():
            found = timed([folder / ".venv" / "bin" / "llmops", *words], folder)
            if number: runs[where].append(found)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--tests", action="store_true")
    chosen = parser.parse_args()
    folders = {"here": HERE} | ({"beside": chosen.beside.resolve()} if chosen.beside else {})
    print(f"{machine()}; medians of {chosen.times}" + (f"; here, and beside it {chosen.beside}" if chosen.beside else ""))
    for name, words in COMMANDS.items(): show(name, in_turns(folders, words, chosen.times))
    with contextlib.ExitStack() as up:
        for folder in folders.values(): up.enter_context(served(folder))
        show("llmops ask, beside serve", in_turns(folders, COMMANDS["llmops ask"], chosen.times))
    if chosen.cold:
        lives = {where: [] for where in folders}
        for _ in range(chosen.times):
            for where, folder in folders.items(): lives[where].append(cold(folder))
        show("life cycle from nothing", {where: [(wall, 0.0) for wall, _ in found] for where, found in lives.items()})
        for stage in lives["here"][0][1]:
            show(f"  {stage}", {where: [(stages.get(stage, 0.0), 0.0) for _, stages in found] for where, found in lives.items()})
    if chosen.tests:
        tests = {where: [timed(["make", "test"], folder) for _ in range(chosen.times)] for where, folder in folders.items()}
        show("make test", tests)


if __name__ == "__main__": main()
