"""The page in a real headless Chromium, from file:// and without a network."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    driver = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright (extra `dev`)")
    with driver.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """opened(path, width, view, **context) -> the page, ready; any error of the script, refused load or request fails the test.

    view: what follows # in the address.
    """
    contexts, problems = [], []

    def load(path, width=1280, view="", **more):
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **more)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
        tab.goto(f"{path.as_uri()}#{view}")
        tab.wait_for_selector("html[data-ready]", timeout=30_000)
        return tab

    yield load
    for context in contexts:
        context.close()
    assert problems == []
