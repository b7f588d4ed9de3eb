"""The settings that the user's own command line gave, before defaults and groups."""

import shlex


def given_settings(command: str) -> dict[str, str]:
    """Each ``key=value`` word by its key, in the order of the command.

    Args:
        command: what starts the script, the script and its words, as a shell takes them.
    """
    words = shlex.split(command)
    script = next((number for number, word in enumerate(words) if word.endswith(".py")), len(words))
    words = words[script + 1 :]
    return {
        word.partition("=")[0].lstrip("+"): word for word in words if "=" in word and not word.startswith("-")
    }
