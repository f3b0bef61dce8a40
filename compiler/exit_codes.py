"""How the command line ends; docs/cli.md says what each code means."""

OK, INTERNAL, BAD_INPUT, NOT_REWRITTEN, READ_TOO_MUCH = 0, 1, 2, 3, 4
INTERRUPTED = 130
