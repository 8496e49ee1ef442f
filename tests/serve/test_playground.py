"""The playground at /: what the server sends, and what a browser does with it."""

import base64
import hashlib
import re
import threading

import httpx2 as httpx
import pytest

from tests.helpers.serving import KEY, Process, served, wait_until

pytest.importorskip("fastapi")

PROMPT = "47+38+59?"
MIXTURE = "mix:code=0.5,math=0.5"


@pytest.fixture(scope="module")
def server():
    with served() as made:
        yield made


def test_the_page_comes_with_a_policy_that_allows_its_own_script_and_style_only(server):
    response = server[0].get("/")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    for kind in ("script", "style"):
        texts = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", response.text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert len(hashes) == 1
        assert policy[f"{kind}-src"] == f"'sha256-{hashes[0]}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]


def test_the_page_asks_nobody_else(server):
    text = server[0].get("/").text
    assert re.findall(r"\b(?:https?:)?//[\w.-]+\.\w+", text) == []
    assert re.findall(r"""\b(?:src|href|action)=["']?([^"'\s>]+)""", text) == ["data:,"]
    assert re.findall(r"\son\w+=[\"']|\sstyle=[\"']|innerHTML|localStorage|document\.cookie|\beval\b", text) == []


def test_every_path_that_the_page_asks_is_there_and_says_what_it_reads(server):
    client, service = server
    text = client.get("/").text
    paths = set(re.findall(r'"((?:v1/[\w/]+|health|metrics))"', text))
    assert paths == {"v1/models", "v1/chat/completions", "v1/completions", "health", "metrics"}
    for path in paths:
        assert (client.post if path.endswith("completions") else client.get)(f"/{path}").status_code in (200, 400)
    health = client.get("/health").json()
    assert set(re.findall(r"\bhealth\.(\w+)", text)) | {"running", "waiting"} <= {*health, "reason"}
    assert health["rows"] == service.model.t2_bank.rows
    for series in re.findall(r'"(t2_\w+)"', text):
        assert re.search(rf"^{series}[ {{]", client.get("/metrics").text, re.MULTILINE), series
    assert all("max_model_len" in m for m in client.get("/v1/models").json()["data"])


def test_health_counts_the_tokens_of_running_requests(server):
    client, _ = server
    before = client.get("/health").json()["generated"]
    body = {"model": "math", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    tokens = client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"]
    assert tokens > 0
    assert client.get("/health").json()["generated"] == before + tokens


def test_without_a_playground_there_is_no_page():
    with served(ui=False) as (client, _):
        assert client.get("/").status_code == 404
        assert client.get("/v1/models").status_code == 200


def test_the_page_follows_the_rules_of_hosts_and_needs_no_key():
    with served(hosts=("localhost", "127.0.0.1"), api_key=KEY) as (client, _):
        assert client.get("/").status_code == 200
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/", headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.get("/v1/models").status_code == 401
        assert KEY not in client.get("/").text


def test_no_ui_is_an_option_of_the_command(tmp_path):
    process = Process(["tiny", "--no-ui"], tmp_path / "log")
    try:
        assert process.client.get("/").status_code == 404
        assert "playground" not in (tmp_path / "log").read_text()
    finally:
        process.kill()


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium: playwright's own, or that of the system."""
    import shutil

    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright, and a Chromium")
    with api.sync_playwright() as p:
        try:
            made = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield made
        made.close()


class Gate:
    """Lets the model's forward pass wait while it is shut."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()

    def __call__(self, model, tokenizer):
        real = model.forward

        def forward(*args, **kwargs):
            assert self.open.wait(60)
            return real(*args, **kwargs)

        model.forward = forward


@pytest.fixture
def page(browser):
    made = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
    made.set_default_timeout(30_000)
    made.faults = []
    made.on("pageerror", lambda error: made.faults.append(str(error)))
    made.on("console", lambda m: made.faults.append(m.text) if "Content Security Policy" in m.text else None)
    yield made
    assert made.faults == []
    made.context.close()


def choose(page):
    """Two experts, a mixture and no base model; a prompt."""
    page.get_by_label("math", exact=True).check()
    page.get_by_label("code", exact=True).check()
    page.get_by_label("tiny", exact=True).uncheck()
    page.get_by_label("code in the mixture", exact=True).fill("0.5")
    page.get_by_label("Weight of math in the mixture").fill("0.5")
    page.get_by_role("button", name="Add mixture").click()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)


def answers(page, n):
    """{name: text} of n answers that have ended."""
    from playwright.sync_api import expect

    expect(page.locator("article[aria-busy=false]")).to_have_count(n, timeout=30_000)
    names = page.locator("article h2").all_inner_texts()
    return dict(zip(names, page.locator("article .text").all_inner_texts(), strict=True))


@pytest.mark.parametrize("kind", ["Chat", "Completion"])
def test_two_experts_and_a_mixture_answer_side_by_side_in_one_batch(page, kind):
    from playwright.sync_api import expect

    gate = Gate()
    with served(gate) as (client, service):
        steps, deliver = [], service.engine._step
        service.engine._step = lambda outputs: (steps.append({o.id for o in outputs}), deliver(outputs))[1]
        names = ["code", "math", MIXTURE]
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}
        expected = {
            name: client.post("/v1/completions", json={"model": name, **body}).json()["choices"][0] for name in names
        }
        page.goto(str(client.base_url))
        choose(page)
        page.get_by_label(kind).check()
        page.get_by_label("Max tokens").fill("20")
        gate.open.clear()
        page.get_by_label("Prompt", exact=True).press("Control+Enter")
        wait_until(lambda: len(service.engine.running) == 3, "all three run before one has a token")
        expect(page.locator("#running")).to_have_text("3")
        expect(page.locator("#rows")).to_have_text("3 of 5")
        expect(page.locator("article[aria-busy=true]")).to_have_count(3)
        gate.open.set()
        assert answers(page, 3) == {name: choice["text"] for name, choice in expected.items()}
        assert max(map(len, steps)) == 3, "a step computes all three"
        for name in names:
            facts = page.get_by_label(f"Answer of {name}", exact=True).locator("dd").all_inner_texts()
            assert facts[0] == expected[name]["finish_reason"]
            assert int(facts[1]) > 0
            assert all(re.fullmatch(r"\d+\.\d\d s", time) for time in facts[2:4])
        expect(page.locator("#said")).to_contain_text("3 answered")
        expect(page.locator("#running")).to_have_text("0")


def test_an_answer_is_shown_while_it_arrives_and_can_be_stopped(page):
    from playwright.sync_api import expect

    gate = Gate()
    with served(gate) as (client, service):
        page.goto(str(client.base_url))
        choose(page)
        real, steps = service.model.forward, 0

        def forward(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == 4:
                gate.open.clear()
            return real(*args, **kwargs)

        service.model.forward = forward
        page.get_by_role("button", name="Send").click()
        text = page.get_by_label("Text of math", exact=True)
        expect(text).not_to_be_empty()
        expect(page.get_by_label("Answer of math", exact=True)).to_have_attribute("aria-busy", "true")
        page.keyboard.press("Escape")
        gone = text.inner_text()
        gate.open.set()
        assert answers(page, 3)["math"] == gone
        expect(page.locator("#said")).to_have_text("Stopped.")
        wait_until(lambda: not service.engine.running, "the server has stopped them")


def test_errors_are_shown_in_words_and_the_key_stays_in_the_tab(page):
    from playwright.sync_api import expect

    with served(api_key=KEY) as (client, service):
        page.goto(str(client.base_url))
        expect(page.get_by_role("alert")).to_have_text("The server asks for an API key. Enter it on this page.")
        page.get_by_label("API key").fill("wrong")
        page.get_by_label("API key").press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("does not know this API key")
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        expect(page.get_by_role("alert")).to_be_hidden()
        choose(page)
        page.get_by_label("Max tokens").fill("500")
        page.get_by_role("button", name="Send").click()
        assert all("maximum context length is 128 tokens" in text for text in answers(page, 3).values())
        expect(page.locator("#said")).to_have_text("3 of 3 failed.")
        page.reload()
        expect(page.get_by_label("math", exact=True)).to_be_visible()  # the key was kept
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        service.engine.failure = "RuntimeError: no more memory"
        choose(page)
        page.get_by_role("button", name="Send").click()
        assert all("no more memory" in text for text in answers(page, 3).values())
        expect(page.locator("#state")).to_have_text("dead")
        service.engine.failure = None
        url = client.base_url
    page.get_by_role("button", name="Send").click()  # the server has ended
    assert all("does not answer" in text for text in answers(page, 3).values())
    expect(page.locator("#state")).to_have_text("no answer")
    with pytest.raises(httpx.TransportError):
        httpx.get(url)


def test_experts_that_come_are_listed_and_a_choice_survives(page):
    from playwright.sync_api import expect

    with served() as (client, _):
        page.goto(str(client.base_url))
        choose(page)
        client.delete("/v1/experts/code")
        page.evaluate("window.dispatchEvent(new Event('focus'))")
        expect(page.get_by_label("code", exact=True)).to_have_count(0)
        expect(page.get_by_label("math", exact=True)).to_be_checked()
        expect(page.get_by_label("Weight of math in the mixture")).to_have_value("0.5")
        page.get_by_role("button", name="Send").click()
        assert "code" in answers(page, 2)[MIXTURE]  # the server says which is missing


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_is_wider_than_the_window(browser, server, width):
    context = browser.new_context(viewport={"width": width, "height": 700})
    page = context.new_page()
    page.goto(str(server[0].base_url))
    choose(page)
    page.get_by_role("button", name="Send").click()
    answers(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
