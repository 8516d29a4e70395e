"""The server, asked by the real client: two train at once, sample, save and resume, each as it would alone."""

import contextlib
import gc
import importlib.util
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F

from torchgraft.functional import bind

tinker = pytest.importorskip("tinker")
pytestmark = pytest.mark.filterwarnings(  # the client asks for its configuration over a connection that it leaves open
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning", "ignore:unclosed:ResourceWarning"
)
EXAMPLES = Path(__file__).parents[2] / "examples"
ADAM = tinker.AdamParams(learning_rate=5e-3, grad_clip_norm=1.0, weight_decay=0.01)


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("TINKER_TELEMETRY", "0")
        spec = importlib.util.spec_from_file_location("tinker_server", EXAMPLES / "tinker_server.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "tinker_server", module)
        spec.loader.exec_module(module)
        patch.setattr(sys.modules["_tinker_worker"], "PATIENCE", 0.05)  # both clients meet, on a busy machine too
        yield module


@contextlib.contextmanager
def serving(example, folder):
    """Yield a service that is served, and its address."""
    service = example.start(example.parse(["--quick", "--rank", "8", "--out", str(folder)]))
    server = example.uvicorn.Server(example.uvicorn.Config(example.Api(service).app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield service, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        service.worker.close()


@pytest.fixture(scope="module")
def served(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with serving(example, folder) as (service, address):
        yield service, address, folder
    gc.collect()  # while warnings are these tests'


@pytest.fixture
def client(served):
    with tinker.ServiceClient(base_url=served[1], api_key="tml-test") as made:
        yield made


def rows_of(seed, count=3):
    """Some rows of symbols, of different lengths."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (9 + 2 * i,), generator=source) for i in range(count)]


def datum(row):
    inputs = {"target_tokens": row[1:].tolist(), "weights": [1.0] * (len(row) - 1)}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(row[:-1].tolist()), loss_fn_inputs=inputs)


class Alone:
    """The same adapter with `bind` and torch's AdamW."""

    def __init__(self, service, model, rank, seed):
        self.graft = bind(model, service.config(tinker.types.LoraConfig(rank=rank)))
        self.params = self.graft.init(torch.Generator().manual_seed(seed))
        self.leaves = [leaf.requires_grad_() for tree in self.params.values() for leaf in tree.values()]
        rate = ADAM.learning_rate
        how = {"betas": (ADAM.beta1, ADAM.beta2), "eps": ADAM.eps, "weight_decay": ADAM.weight_decay}
        self.optimizer = torch.optim.AdamW(self.leaves, lr=rate, **how)

    def loss(self, rows):
        logits = [self.graft(self.params, row[None, :-1])[0] for row in rows]
        return sum(F.cross_entropy(line, row[1:], reduction="sum") for line, row in zip(logits, rows, strict=True))

    def train(self, rows):
        loss = self.loss(rows)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, 1.0)
        self.optimizer.step()
        return loss.item()


def train(training, steps, seed):
    losses = []
    for step in steps:
        done = training.forward_backward([datum(row) for row in rows_of(100 * seed + step)], "cross_entropy")
        training.optim_step(ADAM).result()
        losses.append(done.result().metrics["loss:sum"])
    return losses


def test_two_clients_train_at_once_sample_save_and_resume(example, served, tmp_path):
    service, address, _ = served
    barrier, results = threading.Barrier(2), {}

    def live(seed, rank):
        with tinker.ServiceClient(base_url=address, api_key="tml-test") as client:
            training = client.create_lora_training_client("writer", rank=rank, seed=seed).result()
            assert training.get_info().lora_rank == rank
            barrier.wait()
            losses = train(training, range(6), seed)
            saved = training.save_state("after-six").result().path
            sampler = training.save_weights_and_get_sampling_client().result()
            later = train(training, range(6, 9), seed)
            how = tinker.SamplingParams(max_tokens=7, temperature=0)
            tokens = sampler.sample(tinker.ModelInput.from_ints([1, 2, 3]), 1, how).result().sequences[0].tokens
            results[seed] = losses, saved, tokens, later

    threads = [threading.Thread(target=live, args=pair) for pair in [(1, 8), (2, 3)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(len(set(names)) == 2 for names in service.worker.log)  # they shared batches
    assert service.bank.names == []  # and left nothing behind

    for seed, rank in [(1, 8), (2, 3)]:
        losses, _, tokens, later = results[seed]
        alone = Alone(service, service.worker.model, rank, seed)
        assert losses == pytest.approx([alone.train(rows_of(100 * seed + step)) for step in range(6)], rel=1e-4)
        text = torch.tensor([1, 2, 3])
        for _ in range(7):
            text = torch.cat([text, alone.graft(alone.params, text[None])[0, -1].argmax()[None]])
        assert list(tokens) == text[3:].tolist()
        assert later == pytest.approx([alone.train(rows_of(100 * seed + step)) for step in range(6, 9)], rel=1e-4)

    with (
        serving(example, served[2]) as (_, other),  # another process, as far as adapters know
        tinker.ServiceClient(base_url=other, api_key="tml-test") as client,
    ):
        for seed in (1, 2):
            resumed = client.create_training_client_from_state_with_optimizer(results[seed][1]).result()
            assert train(resumed, range(6, 9), seed) == pytest.approx(results[seed][3], rel=1e-4)
            fresh = client.create_training_client_from_state(results[seed][1]).result()
            values = train(fresh, range(6, 9), seed)
            assert values[0] == pytest.approx(results[seed][3][0], rel=1e-4)
            assert values[2] != pytest.approx(results[seed][3][2], rel=1e-4)  # without the moments


def test_numbers_are_those_of_the_equations(served, client):
    """Log-probabilities in float64; a custom loss; importance sampling; gradients that add up."""
    service = served[0]
    training = client.create_lora_training_client("writer", rank=4, seed=3).result()
    (row,) = rows_of(5, 1)
    expected = service.worker.model.double()(row[None, :-1])[0].log_softmax(-1).gather(1, row[1:, None])[:, 0]
    service.worker.model.float()
    given = training.forward([datum(row)], "cross_entropy").result()
    found = torch.tensor(given.loss_fn_outputs[0]["logprobs"].data, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(tinker.RequestFailedError, match="has no gradients since its last step"):
        training.optim_step(ADAM).result()  # a forward alone gives none

    inputs = {"target_tokens": row[1:].tolist(), "logprobs": (found - 0.1).tolist(), "advantages": [2.0] * len(found)}
    sampled = tinker.Datum(model_input=tinker.ModelInput.from_ints(row[:-1].tolist()), loss_fn_inputs=inputs)
    given = training.forward_backward([sampled], "importance_sampling").result()
    assert given.metrics["loss:sum"] == pytest.approx(-2 * len(found) * torch.tensor(0.1).exp().item(), rel=1e-4)

    def squared(data, logprobs):
        return sum((line**2).sum() for line in logprobs), {}

    done = training.forward_backward_custom([datum(row)], squared).result()
    assert done.metrics["loss:sum"] == pytest.approx(float((expected**2).sum()), rel=1e-4)
    assert training.optim_step(ADAM).result().metrics["step:max"] == 1


def test_samples(client):
    sampler = client.create_sampling_client(base_model="writer").result()
    prompt = tinker.ModelInput.from_ints([5, 6, 7, 8])

    def sample(count=2, **how):
        return sampler.sample(prompt, count, tinker.SamplingParams(**how)).result().sequences

    one, other = sample(max_tokens=9, seed=4), sample(max_tokens=9, seed=4)
    assert [s.tokens for s in one] == [s.tokens for s in other] and one[0].tokens != one[1].tokens
    assert all(len(s.tokens) == len(s.logprobs) == 9 and s.stop_reason == "length" for s in one)
    greedy = sample(max_tokens=5, temperature=0)[0]
    assert greedy.tokens == sample(max_tokens=5, top_k=1)[1].tokens == sample(max_tokens=5, top_p=1e-6)[0].tokens
    first = greedy.tokens[0]
    (stopped,) = sample(1, max_tokens=5, temperature=0, stop=[first])
    assert stopped.tokens == [first] and stopped.stop_reason == "stop"
    scores = sampler.compute_logprobs(tinker.ModelInput.from_ints([5, 6, 7, 8, first])).result()
    assert scores[0] is None or scores[0] != scores[0]
    assert scores[-1] == pytest.approx(greedy.logprobs[0], rel=1e-4)


def test_one_that_fails_in_a_batch_fails_alone(example, served, client):
    """A text that cannot be gone on with, and an adapter that is gone, beside others in one batch."""
    worker = served[0].worker
    request = {"prompt": tinker.ModelInput.from_ints([1]), "num_samples": 1}
    how = [tinker.SamplingParams(max_tokens=3, temperature=0), tinker.SamplingParams(max_tokens=3, temperature=1e-45)]
    fine, bad = (example.read_sample(tinker.types.SampleRequest(**request, sampling_params=one), None) for one in how)
    gone = example.read_sample(tinker.types.SampleRequest(**request, sampling_params=how[0]), "nobody")
    for job in (fine, bad, gone):
        worker.submit(job)
    assert len(fine.future.result()[0][0].tokens) == 3
    with pytest.raises(RuntimeError, match="probability tensor"):
        bad.future.result()
    with pytest.raises(KeyError, match="no adapter has the name 'nobody'"):
        gone.future.result()


def test_a_checkpoint_for_sampling_is_sampled_from(client):
    training = client.create_lora_training_client("writer", rank=2, seed=7).result()
    train(training, range(2), 7)
    path = training.save_weights_for_sampler("two").result().path
    own = training.save_weights_and_get_sampling_client().result()
    read = client.create_sampling_client(model_path=path).result()
    prompt, how = tinker.ModelInput.from_ints([9, 9]), tinker.SamplingParams(max_tokens=8, seed=1)
    assert (
        own.sample(prompt, 1, how).result().sequences[0].tokens
        == read.sample(prompt, 1, how).result().sequences[0].tokens
    )


def refused(make):
    with pytest.raises((tinker.TinkerError, ValueError)) as caught:
        make()
    return str(caught.value)


def test_what_is_not_here_is_refused_in_words(served, client):
    service = served[0]
    assert "this server has 'writer'" in refused(client.create_lora_training_client("other", rank=2).result)
    assert "1 to 8" in refused(client.create_lora_training_client("writer", rank=9).result)
    assert "is not there" in refused(client.create_training_client_from_state("tinker://a:train:0/weights/x").result)
    for path in ("tinker://a:train:0/weights/../../x", "tinker://../weights/x", "tinker://a:train:0/weights/..x"):
        assert "expected tinker://MODEL/weights/NAME" in refused(client.create_sampling_client(path).result)
    assert "this server has 'writer'" in refused(client.create_sampling_client(base_model="x").result)
    other = httpx.get(f"{served[1]}/api/v1/training_runs")
    assert other.status_code == 404 and "GET /api/v1/training_runs is not answered" in other.text
    assert httpx.get(f"{served[1]}/api/v1/healthz", headers={"host": "elsewhere"}).status_code == 400
    known = httpx.get(f"{served[1]}/api/v1/get_server_capabilities").json()["supported_models"]
    assert known[0]["model_name"] == "writer"
    for wrong, loss, words in [
        (datum(torch.tensor([1, 2, 96])), "cross_entropy", "symbols from 0 to 95"),
        (datum(torch.ones(66).long()), "cross_entropy", "expected 1 to 64 symbols"),
        (datum(torch.tensor([1, 2])), "importance_sampling", r"expected \['advantages', 'logprobs', 'target_tokens'\]"),
        (datum(torch.tensor([1, 2])), "ppo", "this server has cross_entropy, importance_sampling"),
    ]:
        training = client.create_lora_training_client("writer", rank=2, seed=0).result()
        with pytest.raises(tinker.RequestFailedError, match=words):
            training.forward_backward([wrong], loss).result()
    sampler = client.create_sampling_client(base_model="writer").result()
    how = tinker.SamplingParams(max_tokens=2)
    topk = sampler.sample(tinker.ModelInput.from_ints([1]), 1, how, topk_sample_logprobs=3)
    assert "topk_sample_logprobs: this server does not answer that" in refused(topk.result)
    long = sampler.sample(tinker.ModelInput.from_ints([1]), 1, tinker.SamplingParams(max_tokens=10**6))
    assert "max_tokens is 1000000" in refused(long.result)
    training = client.create_lora_training_client("writer", rank=2, seed=0).result()
    training.save_state("here").result()
    assert "is there already" in refused(training.save_state("here").result)
    assert "do not expire" in refused(training.save_state("there", ttl_seconds=3600).result)
    assert len(service.bank) == 5


def test_gradients_that_are_not_finite_are_told_and_hurt_nobody(client):
    training = client.create_lora_training_client("writer", rank=2, seed=0).result()
    (row,) = rows_of(1, 1)
    bad = {"target_tokens": row[1:].tolist(), "weights": [float("nan")] * (len(row) - 1)}
    training.forward_backward(
        [tinker.Datum(tinker.ModelInput.from_ints(row[:-1].tolist()), bad)], "cross_entropy"
    ).result()
    with pytest.raises(tinker.RequestFailedError, match="its gradients are not finite; the adapter is as it was"):
        training.optim_step(ADAM).result()
