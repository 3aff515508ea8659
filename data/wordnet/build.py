"""Make synonyms.txt and LICENSE from WordNet 3.0's database (Fellbaum 1998; Princeton University).

    python data/wordnet/build.py /usr/share/wordnet      where Debian's package wordnet-base puts it

Kept are words of lower-case letters, one word for one word: no proper names, no "oil company". The format of the
database is described in WordNet's manual page wndb(5WN).
"""

import re
import sys
from pathlib import Path

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_WORD = re.compile(r"[a-z]+")
_LICENSE_LINES = 29


def synonym_sets(database: Path) -> set[tuple[str, ...]]:
    """Every set of two or more words that share a meaning, each in alphabetical order."""
    found = set()
    for part in _PARTS_OF_SPEECH:
        for line in (database / f"data.{part}").read_text(encoding="ascii").splitlines()[_LICENSE_LINES:]:
            # offset, file, type, number of words in hexadecimal, then word and lexical id alternating; "fast(a)" is
            # an adjective with its place in the sentence.
            fields = line.split()
            words = (fields[4 + 2 * i].partition("(")[0] for i in range(int(fields[3], 16)))
            found.add(tuple(sorted({word for word in words if _WORD.fullmatch(word)})))
    return {words for words in found if len(words) > 1}


def irregular_forms(database: Path, known: set[str]) -> set[tuple[str, str]]:
    """Pairs such as ("went", "go"), for known words."""
    pairs = set()
    for part in _PARTS_OF_SPEECH:
        for line in (database / f"{part}.exc").read_text(encoding="ascii").splitlines():
            form, *lemmas = line.split()
            pairs |= {(form, lemma) for lemma in lemmas if lemma in known and _WORD.fullmatch(form) and form != lemma}
    return pairs


def main() -> None:
    """Write the two files beside this one."""
    database, here = Path(sys.argv[1]), Path(__file__).parent
    lines = (database / "data.noun").read_text(encoding="ascii").splitlines()[:_LICENSE_LINES]
    # Every line of the notice begins with its number.
    notice = "\n".join(line.strip().partition(" ")[2].rstrip() for line in lines)
    (here / "LICENSE").write_text(notice.strip() + "\n", encoding="ascii")
    sets = synonym_sets(database)
    pairs = irregular_forms(database, {word for words in sets for word in words})
    rows = [" ".join(words) for words in sorted(sets)] + [f"{form} > {lemma}" for form, lemma in sorted(pairs)]
    header = "# Derived from WordNet 3.0 by build.py; its terms are in LICENSE. Words of one meaning; form > word."
    (here / "synonyms.txt").write_text("\n".join([header, *rows]) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
