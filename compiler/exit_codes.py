"""How the command line ends; docs/cli.md says what each code means."""

OK, INTERNAL, BAD_INPUT, NOT_REWRITTEN, READ_TOO_MUCH, DIFFERS, NONE_RAN = 0, 1, 2, 3, 4, 5, 6
# As shells give them: 128 and the number of the signal.
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143
