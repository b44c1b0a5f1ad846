"""Chat templates: how a model was taught to tell what a user says from what it says itself."""
import contextlib
import json
import signal
import time

from nanolost.errors import UserError

# a conversation is rendered in milliseconds; a stranger's template may loop for ever
SECONDS = 10

@contextlib.contextmanager
def limited(seconds: float):
    """TimeoutError in what runs longer than that, in the main thread of a system that has alarms."""
    def end(number, frame):
        raise TimeoutError(f"it runs longer than {seconds} seconds")
    try:
        before = signal.signal(signal.SIGALRM, end)
    except (AttributeError, ValueError):
        # Windows, or a notebook's own thread
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def render(template: str, messages: list[dict[str, str]], special: dict[str, str]) -> str:
    """The text of a conversation up to where the model answers. messages: {"role", "content"}; special: texts
    of special tokens by role, as "eos_token". UserError for a template that fails or refuses, as some do
    without a system message."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("a chat template needs jinja2: pip install jinja2") from None

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # A template is a program that came with the model: in the sandbox it reaches no file, and no attribute
    # that could lead to one. Blanks, extensions and names are as in transformers' chat_template_utils.py.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    # an undefined name is empty in some templates' tests and an error in others
    values = {"bos_token": "", "eos_token": "", **special}
    try:
        with limited(SECONDS):
            compiled = environment.from_string(template)
            return compiled.render(messages=messages, add_generation_prompt=True, **values)
    # whatever a stranger's program does wrong
    except Exception as e:
        cause = f"{type(e).__name__}: {e}"
        raise UserError(f"the model's chat template fails ({cause}): use --chat false") from None
