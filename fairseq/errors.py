"""The one error class of the package: everything a user can cause, said in one line."""


class FairseqError(Exception):
    """Bad input, a bad file or an impossible request.

    The message is one line that names the file, line or flag, what is wrong and what to do about it. Command-line
    programs print it and exit with ``exit_status``, without a traceback. What would break the line, or steer a
    terminal, is shown as an escape sequence: file names and contents are part of messages.
    """

    exit_status = 1

    def __init__(self, message: object) -> None:
        super().__init__("".join(map(_shown, str(message))))


def _shown(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]
