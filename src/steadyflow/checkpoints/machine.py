"""The instructions of pickles, as weights need them: each pickle is a program, and this is the machine it runs on.

It differs from Python's own in what a file can do to whoever reads it. A name is looked up by `find`, never imported,
and nothing but what `find` returns is called. No length is believed before it is compared with the bytes left, the
number of instructions is limited, and keys are texts and numbers, whose hashes are no work. Bytes come as views of the
file. Instructions that weights never need (among them all those of protocols 0 and 1 alone) are refused by name.

Reference: PEP 3154 and the module pickletools, which describes every instruction.
"""

import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

INSTRUCTIONS = 2**21  # ten times what the largest training states have; their objects fit in 1 GB
LONGEST = 200  # letters of a module's or a class's name: the rest of a longer one is cut off
NUMBERS = 2**14  # as keys: unlike those of texts, their hashes can be made to collide
CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
FRESH = {pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict, pickle.EMPTY_SET: set}
TEXTS = {pickle.BINUNICODE: 4, pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE8: 8}  # bytes that their length takes
TEXTS_OF_PYTHON_2 = {pickle.SHORT_BINSTRING: 1, pickle.BINSTRING: 4}
BYTES = {pickle.BINBYTES: 4, pickle.SHORT_BINBYTES: 1, pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
NAMES = {op.code.encode("latin1"): op.name for op in pickletools.opcodes}


class Unreadable(ValueError):
    """What is wrong with a file."""


class Global:
    """A name that a pickle asks for.

    Attributes:
        name: as "collections.OrderedDict".
        make: called with the pickle's arguments where the pickle calls it, or makes an object of it.
    """

    def __init__(self, name: str, make: Callable[..., Any]):
        self.name, self.make = name, make


class Restored:
    """What is made by a name, and then given its state."""

    def restore(self, state: Any) -> None:
        """Takes what the pickle holds of it."""
        raise NotImplementedError


class Record(Restored):
    """An object of a class that is not here, as data.

    Attributes:
        name: of its class, as "torch.nn.modules.container.ModuleDict"; in an EDM pickle the class alone, "SongUNet".
        arguments: of its construction, as the pickle has them.
        state: what the class would have restored itself from: mostly a dict of its attributes.
    """

    def __init__(self, name: str, *arguments: Any, state: Any = None):
        self.name, self.arguments, self.state = name, arguments, state

    def restore(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        """An attribute of the state."""
        return self.state[key]

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The state dict of a record that was a torch module: parameters and buffers by their dotted names."""
        state = self.state if isinstance(self.state, dict) else {}
        found: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            found |= {f"{prefix}{k}": v for k, v in (state.get(kind) or {}).items() if isinstance(v, Tensor)}
        for name, module in (state.get("_modules") or {}).items():
            if isinstance(module, Record):
                found |= module.tensors(f"{prefix}{name}.")
        return found


class Machine:
    """Runs the pickles that stand one behind the other in `data`, each by `load`.

    Attributes:
        place: of the next byte.
        left, numbers, copies: instructions, keys that are numbers, and letters and members of what is given to calls,
            that the rest may have.
    """

    def __init__(self, data: memoryview):
        self.data, self.place = data, 0
        self.left, self.numbers, self.copies = INSTRUCTIONS, NUMBERS, 2 * len(data) + 2**20

    def find(self, name: str) -> Any:
        """What a name stands for: a `Global`, or a value. Raises Unreadable where it may not be asked for."""
        raise NotImplementedError

    def persistent(self, description: Any) -> Any:
        """What stands outside the pickle."""
        raise NotImplementedError

    def load(self) -> Any:
        """The object that the pickle at `place` makes.

        Raises:
            Unreadable: what it asks for that it may not, or what is damaged; other exceptions for other damage.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        while (code := self.take(1).tobytes()) != pickle.STOP:
            self.left -= 1
            if self.left < 0:
                raise Unreadable(f"a pickle of more than {INSTRUCTIONS} instructions, which weights never have")
            self._run(code)
        return self._pop()

    def take(self, size: int) -> memoryview:
        """The next bytes.

        Raises:
            Unreadable: there are fewer.
        """
        left = len(self.data) - self.place
        if size > left:
            raise Unreadable(f"truncated: it asks for {size} bytes at byte {self.place}, and {left} are left")
        self.place += size
        return self.data[self.place - size : self.place]

    def _run(self, code: bytes) -> None:
        push = self.stack.append
        match code:
            case pickle.BINPUT | pickle.LONG_BINPUT:
                self.memo[self._number(1 if code == pickle.BINPUT else 4)] = self._top()
            case pickle.MEMOIZE:
                self.memo[len(self.memo)] = self._top()
            case pickle.BINGET | pickle.LONG_BINGET:
                index = self._number(1 if code == pickle.BINGET else 4)
                if index not in self.memo:
                    raise Unreadable(f"damaged: it asks for what it never put at {index}")
                push(self.memo[index])
            case _ if code in CONSTANTS:
                push(CONSTANTS[code])
            case _ if code in FRESH:
                push(FRESH[code]())
            case pickle.BININT1 | pickle.BININT2:
                push(self._number(1 if code == pickle.BININT1 else 2))
            case pickle.BININT:
                push(int.from_bytes(self.take(4), "little", signed=True))
            case pickle.LONG1:
                push(int.from_bytes(self.take(self._number(1)), "little", signed=True))
            case pickle.BINFLOAT:
                push(struct.unpack(">d", self.take(8))[0])
            case _ if code in TEXTS:
                push(str(self.take(self._number(TEXTS[code])), "utf-8", "replace"))
            case _ if code in TEXTS_OF_PYTHON_2:
                push(str(self.take(self._number(TEXTS_OF_PYTHON_2[code])), "latin1"))
            case _ if code in BYTES:
                push(self.take(self._number(BYTES[code])))
            case pickle.MARK:
                self.below.append(self.stack)
                self.stack = []
            case pickle.TUPLE:
                items = tuple(self._since_mark())
                self.stack.append(items)
            case _ if code in TUPLES:
                items = tuple(self._pop() for _ in range(TUPLES[code]))[::-1]
                push(items)
            case pickle.GLOBAL:
                push(self._find(self._line(), self._line()))
            case pickle.STACK_GLOBAL:
                name, module = self._pop(), self._pop()
                push(self._find(module, name))
            case pickle.BINPERSID:
                push(self.persistent(self._pop()))
            case pickle.REDUCE | pickle.NEWOBJ:
                arguments, called = self._pop(), self._pop()
                push(self.call(called, arguments))
            case pickle.BUILD:
                state, target = self._pop(), self._top()
                if isinstance(target, Restored):
                    self._spend(state)
                    target.restore(state)
                elif not isinstance(target, OrderedDict):  # whose attributes, as a state dict's _metadata, are left out
                    raise Unreadable(f"damaged: it gives a state to a {type(target).__name__}")
            case pickle.APPEND:
                self._extend([self._pop()])
            case pickle.APPENDS:
                self._extend(self._since_mark())
            case pickle.SETITEM:
                value, key = self._pop(), self._pop()
                self._fill([key, value])
            case pickle.SETITEMS:
                self._fill(self._since_mark())
            case pickle.ADDITEMS:
                members = self._since_mark()
                self._target(set).update(map(self.key, members))
            case pickle.FROZENSET:
                members = self._since_mark()
                self.stack.append(frozenset(map(self.key, members)))
            case pickle.PROTO:
                self.take(1)
            case pickle.FRAME:
                self.take(8)
            case _:
                if code not in NAMES:
                    raise Unreadable(f"damaged: {code!r} at byte {self.place - 1} of the pickle is no instruction")
                raise Unreadable(f"refused: the pickle has the instruction {NAMES[code]}, which weights never need")

    def call(self, called: Any, arguments: Any) -> Any:
        """What a name makes of arguments."""
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise Unreadable(f"damaged: it calls a {type(called).__name__}")
        self._spend(arguments)
        return called.make(*arguments)

    def _spend(self, arguments: Any) -> None:
        """Counts what a call may copy: the same long list may be the argument of many."""
        if isinstance(arguments, tuple):
            parts = (part for part in arguments if isinstance(part, str | bytes | list | tuple | dict | memoryview))
            self.copies -= len(arguments) + sum(map(len, parts))
        if self.copies < 0:
            raise Unreadable("refused: it copies its parts again and again, which weights never need")

    def _number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def _line(self) -> str:
        end = self.data[self.place : self.place + 4096].tobytes().find(b"\n")
        if end < 0:
            raise Unreadable(f"damaged: a name without an end at byte {self.place}")
        return str(self.take(end + 1)[:-1], "utf-8", "replace")

    def _find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Unreadable("damaged: it asks for a name that is no text")
        full = f"{'builtins' if module == '__builtin__' else module[:LONGEST]}.{name[:LONGEST]}"
        return self.find(full)

    def _top(self) -> Any:
        if not self.stack:
            raise Unreadable(f"damaged: it takes more than it made, before byte {self.place}")
        return self.stack[-1]

    def _pop(self) -> Any:
        top = self._top()
        self.stack.pop()
        return top

    def _since_mark(self) -> list[Any]:
        if not self.below:
            raise Unreadable(f"damaged: it asks for a mark it never set, before byte {self.place}")
        items, self.stack = self.stack, self.below.pop()
        return items

    def _target(self, kind: type) -> Any:
        if not isinstance(self._top(), kind):
            raise Unreadable(f"damaged: it fills a {type(self._top()).__name__} as if it were a {kind.__name__}")
        return self._top()

    def _extend(self, items: list[Any]) -> None:
        self._target(list).extend(items)

    def _fill(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Record):  # of a subclass of dict
            target.state = {} if target.state is None else target.state
            target = target.state
        if not isinstance(target, dict) or len(items) % 2:
            raise Unreadable(f"damaged: it fills a {type(target).__name__} as if it were a dict")
        target.update(self.pairs(zip(items[::2], items[1::2])))

    def pairs(self, items: Iterable[Iterable[Any]]) -> dict[Any, Any]:
        """A dict of pairs, whose keys are checked."""
        return {self.key(key): value for key, value in items}

    def key(self, key: Any) -> Any:
        """The key of a dict or member of a set, if it is a text or number.

        Raises:
            Unreadable: it is neither, or there are too many numbers.
        """
        if isinstance(key, str):
            return key
        self.numbers -= 1
        if not isinstance(key, int | float | None) or self.numbers < 0:
            kind = f"more than {NUMBERS} numbers" if self.numbers < 0 else f"a {type(key).__name__}"
            raise Unreadable(f"refused: keys are texts and some numbers, here {kind}")
        return key
