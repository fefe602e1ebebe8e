"""A student's files as modules, and what went wrong in them as one sentence with its line."""

import ast
import difflib
import functools
import inspect
import sys
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lab.exercise.parts import PARTS, Part


class Failure(Exception):
    """What is wrong with a submission, in one sentence, and the line in the student's file.

    Attributes:
        line: the sentence names it already; None where no line can be blamed.
        cause: the student's exception, if there was one.
        unwritten: whether the part is still a TODO.
        mistake: what the failed check has recognized, an entry of symptoms.py or options.py.
        code: the student's line that led to `cause`.
    """

    def __init__(
        self,
        sentence: str,
        line: int | None = None,
        cause: BaseException | None = None,
        unwritten: bool = False,
        mistake: Any = None,
        code: str = "",
    ):
        super().__init__(sentence)
        self.code = code
        self.line, self.cause, self.unwritten, self.mistake = line, cause, unwritten, mistake


@dataclass
class Submission:
    """The modules of one student. `steps` is the same module as `model` where there is one file."""

    model: types.ModuleType
    steps: types.ModuleType
    files: tuple[Path, ...]
    own: dict[str, Any] = field(default_factory=dict)  # the student's classes and functions
    steps_failure: Failure | None = None  # why `steps` is empty

    @classmethod
    def load(cls, model_file: Path, steps_file: Path | None) -> "Submission":
        """Runs the student's files as modules. Raises Failure for the model's file."""
        model, failed = _load_module(model_file, "model"), None
        try:
            steps = _load_module(steps_file, "steps") if steps_file else model
        except Failure as failure:  # the parts in the other file can still be checked
            steps, failed = types.ModuleType("steps"), failure
        files = (model_file, steps_file) if steps_file and not failed else (model_file,)
        submission = cls(model, steps, files, steps_failure=failed)
        for part in PARTS.values():
            submission.own[part.name] = getattr(submission.module_of(part), part.name, None)
        return submission

    def module_of(self, part: Part) -> types.ModuleType:
        return self.steps if part.is_function else self.model

    def find(self, part: Part, *arguments: Any) -> Any:
        """The student's class or function. Raises Failure if none takes these arguments."""
        if part.is_function and self.steps_failure:
            raise self.steps_failure
        found = self.own[part.name]
        module = self.module_of(part)
        kind = "function" if part.is_function else "class"
        if found is None:
            names = {n.lower(): n for n in vars(module) if n[0] != "_" and n not in PARTS}
            similar = difflib.get_close_matches(part.name.lower(), names, 1, cutoff=0.7)
            name = names[similar[0]] if similar else None
            guess = f" Is it the one called {name}? Then rename it." if name else ""
            line = self.line_of(name) if name else None
            raise Failure(f"{where(module, line)}: there is no {kind} {part.name}.{guess}", line)
        if not (inspect.isfunction(found) if part.is_function else inspect.isclass(found)):
            raise Failure(f"{where(module, None)}: {part.name} is not a {kind}")
        signature = inspect.signature(found)
        try:
            signature.bind(*arguments)
        except TypeError as error:
            says = f"{part.name} cannot be called as the scripts call it ({error}); it takes "
            raise self.failure(part, f"{says}{signature}", "__init__") from error
        return found

    def config(self, options: dict[str, Any]) -> Any:
        """The student's ViTConfig with some options; the hand-out brings the class along."""
        if not hasattr(self.model, "ViTConfig"):
            raise Failure(
                f"{where(self.model, None)}: the class ViTConfig is missing; copy it from the "
                "model.py that you were given"
            )
        try:
            return self.model.ViTConfig(**options)
        except Exception as error:
            raise self.explain(error) from error

    def failure(
        self, part: Part, says: str, method: str | None = "forward", line: int | None = None,
        **details: Any,
    ) -> Failure:  # fmt: skip
        """A failure at a line of the student's file, by default where a part or method begins."""
        line = line or self.line_of(part.name, method)
        return Failure(f"{where(self.module_of(part), line)}: {says}", line, **details)

    def line_of(self, name: str, method: str | None = None) -> int | None:
        """The line where a class or function, or a method of the class, is defined."""
        for file in self.files:
            for node in _statements(file.read_text(encoding="utf-8-sig")):
                if getattr(node, "name", None) == name:
                    for inner in getattr(node, "body", []):
                        if getattr(inner, "name", None) == method:
                            return inner.lineno
                    return node.lineno
        return None

    def explain(self, error: BaseException, part: Part | None = None) -> Failure:
        """An exception as a Failure. If no line of the student's led to it, it names the part."""
        failure = error if isinstance(error, Failure) else _explain(error, self.files)
        if failure.line is None and part:
            details = {"cause": failure.cause, "unwritten": failure.unwritten}
            return self.failure(part, str(failure), **details)
        return failure


@functools.cache
def _statements(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def _load_module(path: Path, name: str) -> types.ModuleType:
    """Runs a file as the module `name`. Raises Failure, with the line, if that fails."""
    try:
        source = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path.name} cannot be read as text: {error}") from error
    module = types.ModuleType(name)
    module.__file__ = str(path)
    try:
        code = compile(source, str(path), "exec")
        sys.modules[name] = module  # dataclasses look their module up; steps may import model
        exec(code, vars(module))
    except SyntaxError as error:
        wrong = (error.text or "").strip()
        at = f": `{wrong}`" if wrong else ""
        raise Failure(
            f"{path.name}, line {error.lineno}: syntax error ({error.msg}){at}",
            error.lineno,
            error,
        ) from error
    except (Exception, SystemExit) as error:
        raise _explain(error, (path,)) from error
    return module


def _explain(error: BaseException, files: tuple[Path, ...]) -> Failure:
    """One sentence about an exception, with the last line of the student's that led to it."""
    names = {str(path): path.name for path in files}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in names]
    line = frames[-1].lineno if frames else None
    place = f"{names[frames[-1].filename]}, line {line}: " if frames else ""
    text = (str(error).strip() or "no message").splitlines()[0]
    # A TODO of the hand-out, or a bare `raise NotImplementedError`; PyTorch's have another text.
    unwritten = not str(error) or "is not written yet" in text
    if isinstance(error, NotImplementedError) and unwritten:
        name = frames[-1].name if frames else "this part"
        return Failure(f"{place}{name} is not written yet", line, error, True)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return Failure(f"{place}this needs more memory than the check allows", line, error)
    if isinstance(error, RecursionError):
        return Failure(
            f"{place}infinite recursion: this function keeps calling itself", line, error
        )
    if isinstance(error, SystemExit):
        return Failure(f"{place}your code ends the program here", line, error)
    code = frames[-1].line if frames else ""
    return Failure(f"{place}{type(error).__name__}: {text}", line, error, code=code)


def where(module: types.ModuleType, line: int | None) -> str:
    name = Path(module.__file__).name
    return f"{name}, line {line}" if line else name


class NaNFinder(TorchFunctionMode):
    """Within this context, remembers the first line of the student's that produced a NaN."""

    def __init__(self, files: tuple[Path, ...]):
        super().__init__()
        self.files, self.line = {str(path) for path in files}, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.line is None and isinstance(result, torch.Tensor) and result.is_floating_point():
            with torch._C.DisableTorchFunction():
                broken = bool(result.isnan().any())
            frame = sys._getframe(1) if broken else None
            while frame and frame.f_code.co_filename not in self.files:
                frame = frame.f_back
            if frame:
                self.line = frame.f_lineno
        return result
