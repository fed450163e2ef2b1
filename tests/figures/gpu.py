"""The tests marked gpu and every figure that wants a GPU, by one command, in one record.

    python tests/figures/gpu.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --commit COMMIT

--model is the stand-in; speeds are of a full-size DistilBERT with random weights, which floor writes. A
figure is a process with a limit of seconds that notes at once what it finds. --device cpu --quick tries it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from time import perf_counter

import measure

import lora_scratch as scratch

import benchmark
import torch
from benchmark import BATCH, Row
from torch import Tensor, nn, profiler

LIMITS = {"floor": 120, "tests": 240, "speed": 240, "profile": 60, "graphs": 90, "answer": 60}
LIMITS |= {"accuracy": 90, "compiled": 240}  # seconds, in this order
SIZES = {"dim": 768, "layers": 6, "phrases": 8000, "lines": 67_349, "matrix": 8192, "steps": 1000}
QUICK = {"dim": 64, "layers": 1, "phrases": 800, "lines": 800, "matrix": 512, "steps": 5}
STEPS, LENGTHS = 12_630, (16, 24, 32, 48, 64)  # 3 epochs of SST-2; 4 phrases are longer, and cut


class Figures(argparse.Namespace):
    """The flags, and a method for each figure."""

    folder = measure.ROOT / "model" / "gpu"

    def note(self, pace: float = 0, **found: object) -> None:
        """Add to the record; pace: seconds of a step."""
        found |= {"sentences_per_second": BATCH / pace, "seconds_of_12630": STEPS * pace} if pace else {}
        record = measure.read_record(self.output)
        record["runs"].setdefault(self.one, {}).update(found)
        measure.write_record(self.output, record)

    def floor(self) -> None:
        """Operations as in benchmark.py; of the bytes those of the weights, forward and back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        tokens = benchmark.prepare(Row("prepare", "", 1), self.folder, self)["mean_tokens"]
        one = torch.randn(self.matrix, self.matrix, dtype=torch.bfloat16, device=self.device)
        many, weights, seconds = one.repeat(8, 1), self.layers * 12 * self.dim**2, []
        for work in (lambda: one @ one, many.clone):  # to read a number waits for the device
            calls = benchmark.second_time(lambda work=work: sum(work()[0, 0] for _ in range(50)).item())
            seconds.append(calls / 50)
        rate, speed = 2 * self.matrix**3 / seconds[0], 2 * many.nbytes / seconds[1]
        step, moved, answer = 4 * weights * tokens * BATCH, 4 * weights, 2 * weights * tokens * self.lines
        self.note(operations_per_second=rate, bytes_per_second=speed, mean_tokens=tokens)
        self.note(max(step / rate, moved / speed), step_operations=step, step_bytes=moved)
        self.note(answer_operations=answer, answer_seconds=answer / rate)

    def tests(self) -> None:
        os.environ |= {"LORA_TEST_BASE": self.model, "LORA_TEST_SST2": self.dataset}
        words = ["-m", "pytest", "-s", "-m", "gpu", "tests/test_gpu.py"]
        words += ["-k", "losses and tiny_base"] if self.quick else []
        os.environ["LORA_TEST_DEVICE"] = self.device
        done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
        self.note(told=re.findall(r"apart: .*|right of .*|FAILED .*|ERROR .*|\d+ passed.*", done.stdout))
        done.check_returncode()

    def speed(self) -> None:
        """The script, and the Trainer at its best, in turn: seconds of second epochs."""
        seconds = {"scratch": [], "trainer-grouped": []}
        for kind in [*seconds] * (1 if self.quick else 2):
            found = benchmark.run_once(Row(kind, "bf16", self.phrases), self.folder, self)
            seconds[kind].append(found["seconds"])
            self.note(min(seconds["scratch"]) * BATCH / self.phrases, seconds=seconds)
        self.note(trainer_by_scratch=measure.ratios(*reversed(seconds.values())))

    def accuracy(self) -> None:
        flags = ["--model", self.model, "--dataset", self.dataset, "--device", self.device]
        flags += ["--precision", "bf16", "--recipe", "best", "--max-steps", self.steps]
        record = measure.train("lora_scratch.py", flags, self.folder / "best.pt")
        self.note(result=record["result"]["text"], process_seconds=record["process_seconds"])

    def profile(self) -> None:
        """Of 20 steps of the script, on the device alone: to look at the host slows it."""
        kind, collate, spent = self.device.upper(), scratch.collate, Counter()
        plan = profiler.schedule(wait=15, warmup=5, active=20, repeat=1)
        flags = ["--recipe=published", "--precision=bf16", "--max-steps=45", f"--output={self.folder}/a.pt"]
        with profiler.profile(activities=[getattr(profiler.ProfilerActivity, kind)], schedule=plan) as found:
            scratch.collate = lambda *given: found.step() or collate(*given)
            scratch.main([*self.flags, *flags])
        events = [e for e in found.events() if e.device_type.name == kind and not e.is_user_annotation]
        for event in events:
            spent[event.name[:90]] += event.time_range.elapsed_us()
        whole = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        self.note(microseconds=whole, idle=1 - spent.total() / whole, launches=len(events))
        self.note(most=dict(spent.most_common(10)))

    def load(self, change=lambda model: None) -> tuple[nn.Module, scratch.Tokens]:
        torch.manual_seed(42)
        base = scratch.load_base(str(self.folder), None, ["no", "yes"], LENGTHS[-1])
        scratch.inject_lora(base.model, base.head)
        change(base.model)
        lines = (self.folder / "lines.txt").read_text(encoding="utf-8").splitlines()
        tokens = scratch.tokenize(lines, base.tokenizer, LENGTHS[-1])
        return scratch.speed_up(base, torch.bfloat16).to(self.device), tokens

    def answer(self) -> None:
        """All phrases by the merged model, on batches that are on the device already."""
        model, tokens = self.load(scratch.merge_lora)
        rows = scratch.make_batches(tokens.lengths, 512)
        batches = [scratch.collate(tokens, one, model).values() for one in rows]
        for _ in range(2):
            start = perf_counter()
            with scratch.autocast(model.eval()), torch.inference_mode():
                found = [model(ids, mask.bool()[:, None, None]).logits for ids, mask in batches]
            torch.cat(found).argmax(dim=1).cpu()
        self.note(phrases=len(tokens), seconds=perf_counter() - start)
        self.note(by_predict=benchmark.second_time(lambda: scratch.predict(model, tokens, 512)))

    def steps_of(self, kind: str = "") -> Tensor:
        """Losses of lora_scratch.train's step on batches that are on the device already."""
        (model, tokens), batches, graphs = self.load(), [], {}
        how = {"lr": 2e-4, "fused": True, "capturable": self.device == "cuda"}
        optimizer = torch.optim.AdamW(model.train().parameters(), **how)
        for rows in scratch.make_batches(tokens.lengths, BATCH, 42)[: self.phrases // BATCH]:
            ids, mask = scratch.collate(tokens, rows, model).values()
            more = (0, min(n for n in LENGTHS if n >= ids.shape[1]) - ids.shape[1])
            padded = [nn.functional.pad(one, more) for one in (ids, mask.bool())]
            batches.append([*padded, torch.tensor(rows, device=self.device) % 2])  # made-up labels

        def step(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
            with scratch.autocast(model):  # a mask of four dimensions transformers leaves as it is
                loss = nn.functional.cross_entropy(model(ids, mask[:, None, None]).logits.float(), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        def losses(some: list, times: int = 1) -> Tensor:
            found = []
            for batch in some * times:
                graph, static, loss = graphs.get(batch[0].shape, (None, [], None))
                [old.copy_(new) for old, new in zip(static, batch, strict=False)]
                graph.replay() if graph else (loss := step(*batch))
                found.append(loss.clone())
            return torch.stack(found).cpu()  # waits for the device

        firsts = [*{batch[0].shape: batch for batch in batches}.values()]  # one of each length
        losses(firsts, times=3)
        start = perf_counter()
        model.compile(mode="reduce-overhead") if kind == "compiled" else None
        for batch in firsts if kind == "graphs" else ():
            static, graph = [one.clone() for one in batch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                graphs[batch[0].shape] = graph, static, step(*static)
        losses(firsts, times=3)
        torch.manual_seed(0)
        middle, found = perf_counter(), losses(batches)
        self.note((perf_counter() - middle) / len(batches), start_up_seconds=middle - start)
        return found

    def compiled(self) -> None:
        scratch.CheapDropout.forward = nn.Dropout.forward  # as it is on a GPU
        self.steps_of("compiled")

    def graphs(self) -> None:
        """The step as a graph recorded for each length, and how far apart its losses are."""
        if self.device == "cpu":
            return self.note(recorded="needs CUDA")
        torch.cuda.set_stream(torch.cuda.Stream())  # one for all: the default one records nothing
        plain = self.steps_of()
        self.note(without=measure.read_record(self.output)["runs"]["graphs"])
        apart = (self.steps_of("graphs") - plain).abs()
        self.note(apart_in_20_steps=apart[:20].max().item(), apart=apart.max().item())


def main() -> None:
    parser = measure.make_parser(__doc__, "gpu.json")
    add = parser.add_argument
    add("--model", type=os.path.abspath, required=True, help="the stand-in")
    add("--dataset", type=os.path.abspath, required=True, help="SST-2's folder")
    add("--commit", required=True, help="which one is measured: there may be no git")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="tiny sizes")
    add("--only", nargs="+", choices=LIMITS, default=[*LIMITS], help="(default: all)")
    add("--one", help=argparse.SUPPRESS)
    args = Figures(**vars(parser.parse_args()))
    sizes, data = QUICK if args.quick else SIZES, args.folder / "data"
    vars(args).update(sizes, tokenizer=args.model)
    args.flags = [f"--model={args.folder}", f"--dataset={data}", f"--device={args.device}"]
    if args.one:
        return getattr(args, args.one)()
    machine = {"name": measure.cpu_name(), "versions": measure.versions()}
    machine["card"] = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    facts = {"machine": machine, "commit": args.commit, "sizes": sizes}
    measure.write_record(args.output, measure.continue_record(args.output, facts, {}))
    for name in args.only:
        start, args.one = perf_counter(), name
        words = ["timeout", "-s", "KILL", str(LIMITS[name]), sys.executable, *sys.argv, "--one", name]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
        error = re.sub(r"\S*/", "", done.stderr.strip()[-300:]) if done.returncode else ""
        args.note(exit_code=done.returncode, error=error, took=perf_counter() - start)  # -9: cut off
        print(name, measure.read_record(args.output)["runs"][name], done.stderr[-2000:] if error else "")


if __name__ == "__main__":
    main()
