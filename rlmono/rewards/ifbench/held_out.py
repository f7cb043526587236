"""IFBench's held-out instructions (arXiv:2507.02833, appendix), by their ids and with their data's argument names.

One of its 58 is not here: `words:start_verb` needs a tagger or a dictionary of verbs. `words:odd_even_syllables` needs the package syllapy, as the
benchmark does.
"""

from __future__ import annotations

import csv
import datetime
import re
import string
from collections import Counter
from itertools import pairwise

from rlmono.rewards.ifbench.places import european_capitals_sort, reverse_newline
from rlmono.rewards.ifbench.text import Check, lines, plain_words, sentences, words

_NAMES = frozenset("""
    Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin Harper Leo Zoe Daniel Chloe
    Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher
    Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan
""".split())
_CONJUNCTIONS = frozenset(("and", "but", "for", "nor", "or", "so", "yet"))
_PRONOUNS = frozenset("""
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself they
    them their theirs themselves
""".split())
_STOP_WORDS = _PRONOUNS | frozenset("""
    a about above after again against all am an and any are as at be because been before being below between both but by can did do does doing
    down during each few for from further had has have having here how if in into is just more most no nor not now of off on once only or
    other out over own same should so some such t s don than that the then there these this those through to too under until up very was
    were what when where which while who whom why will with
""".split())
_EMOJI = re.compile(r"[\U0001F000-\U0001FAFF\u2600-\u27BF\u2190-\u21FF\u2B00-\u2BFF\u2300-\u23FF][\uFE0F\u200D\U0001F3FB-\U0001F3FF]*")
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


# ---------------------------------------------------------------- counts and ratios


def word_count_range(response: str, min_words: int, max_words: int) -> bool:
    return min_words <= len(words(response)) <= max_words


def unique_word_count(response: str, N: int) -> bool:
    """At least N different words."""
    return len(set(plain_words(response))) >= N


def stop_words(response: str, percentage: float) -> bool:
    """At most so many percent of the words are stop words."""
    found = [word.lower() for word in words(response)]
    return bool(found) and 100 * sum(word in _STOP_WORDS for word in found) <= percentage * len(found)


def sentence_type(response: str) -> bool:
    """Twice as many sentences end with a dot as with a question mark."""
    ends = _ends(response)
    return ends["."] == 2 * ends["?"]


def sentence_balance(response: str) -> bool:
    """As many statements as questions as exclamations."""
    ends = _ends(response)
    return ends["."] == ends["?"] == ends["!"]


def _ends(response: str) -> Counter[str]:
    return Counter(sentence.rstrip("\"'”’)*_ ")[-1:] for sentence in sentences(response))


def conjunctions(response: str, small_n: int) -> bool:
    """At least so many different coordinating conjunctions."""
    return len(_CONJUNCTIONS & set(plain_words(response))) >= small_n


def person_names(response: str, N: int) -> bool:
    """At least N different names of IFBench's list."""
    return len(_NAMES & set(words(response))) >= N


def overlap(response: str, reference_text: str, percentage: float) -> bool:
    """Of the response's different trigrams of words, so many percent (±2) are the reference's too."""
    mine, reference = _trigrams(response), _trigrams(reference_text)
    return bool(mine) and abs(100 * len(mine & reference) / len(mine) - percentage) <= 2


def _trigrams(text: str) -> set[tuple[str, ...]]:
    tokens = re.findall(r"\w+|[^\w\s]", text)
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


def numbers(response: str, N: int) -> bool:
    """Exactly N numbers in digits."""
    return len(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", response)) == N


def pronouns(response: str, N: int) -> bool:
    """At least N personal or possessive pronouns."""
    return sum(word in _PRONOUNS for word in plain_words(response.replace("'", " ").replace("’", " "))) >= N


def punctuation(response: str) -> bool:
    """Each of . , ! ? ; : and the interrobang besides."""
    without, found = re.subn(r"\?!|!\?|‽", "", response, count=1)
    return found == 1 and all(mark in without for mark in ".,!?;:")


def keywords_multiple(response: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    """1, 2, 3, 5 and 7 times, in this order of the keywords."""
    wanted = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(response.lower().count(keyword.strip().lower()) == n for keyword, n in wanted)


def words_japanese(response: str, N: int) -> bool:
    """Every N-th word is Japanese, or a number."""
    found = [word.strip(string.punctuation) for word in response.split()]
    return all(not word or word.isdigit() or _JAPANESE.search(word) is not None for word in found[N - 1::N])


# ---------------------------------------------------------------- words


def alphabet(response: str) -> bool:
    """Each word begins with the letter after the last one's, and with a after z."""
    initials = [word[0] for word in plain_words(response)]
    return all(a in string.ascii_lowercase and b == string.ascii_lowercase[(string.ascii_lowercase.index(a) + 1) % 26] for a, b in pairwise(initials))


def vowel(response: str) -> bool:
    """One paragraph with at most three of the vowels."""
    return "\n" not in response.strip() and len(set("aeiou") & set(response.lower())) <= 3


def consonants(response: str) -> bool:
    """Two consonants together in every word."""
    return all(re.search(r"[bcdfghjklmnpqrstvwxyz]{2}", word.lower()) for word in response.split())


def palindrome(response: str) -> bool:
    """At least ten words of five letters or more that read the same backwards."""
    return sum(len(word) >= 5 and word == word[::-1] for word in _bare(response)) >= 10


def prime_lengths(response: str) -> bool:
    """The length of every word is a prime number."""
    return all(len(word) > 1 and all(len(word) % i for i in range(2, len(word))) for word in _bare(response))


def repeats(response: str, small_n: int) -> bool:
    """No word more often than that."""
    return max(Counter(_bare(response)).values(), default=0) <= small_n


def no_consecutive(response: str) -> bool:
    """No two words after each other begin with the same letter."""
    return all(a[0] != b[0] for a, b in pairwise(_bare(response)))


def _bare(response: str) -> list[str]:
    """Words in small letters, without any punctuation."""
    return response.lower().translate(str.maketrans("", "", string.punctuation)).split()


def words_position(response: str, keyword: str) -> bool:
    """The second word, and the last but one."""
    found = plain_words(response)
    return len(found) >= 2 and found[1] == found[-2] == keyword.strip().lower()


def keywords_specific_position(response: str, keyword: str, n: int, m: int) -> bool:
    """The m-th word of the n-th sentence."""
    found = sentences(response)[n - 1:n]
    return bool(found) and [word.lower() for word in plain_words(found[0])[m - 1:m]] == [keyword.strip().lower()]


# ---------------------------------------------------------------- sentences and paragraphs


def sentence_keyword(response: str, word: str, N: int) -> bool:
    """The N-th sentence has the word."""
    found = sentences(response)[N - 1:N]
    return bool(found) and re.search(rf"\b{re.escape(word)}\b", found[0], re.IGNORECASE) is not None


def alliteration_increment(response: str) -> bool:
    """Each sentence has more words that begin as their neighbour does than the one before."""
    counts = []
    for sentence in sentences(response):
        initials = [word[0] for word in plain_words(sentence)]
        runs = re.findall(r"(.)(\1+)", "".join(initials))
        counts.append(sum(1 + len(rest) for _, rest in runs))
    return all(a < b for a, b in pairwise(counts))


def sentence_words(response: str) -> bool:
    """Three sentences of one length in characters, with no word twice."""
    found = sentences(response)
    return len(found) == 3 and len({len(sentence) for sentence in found}) == 1 and repeats(response, 1)


def odd_even_syllables(response: str) -> bool:
    """Words with odd and even numbers of syllables alternate."""
    import syllapy
    odd = [syllapy.count(word) % 2 for word in plain_words(response)]
    return all(a != b for a, b in pairwise(odd))


def last_first(response: str) -> bool:
    """A sentence's last word is the next one's first."""
    found = [plain_words(sentence) for sentence in sentences(response)]
    return all(a and b and a[-1] == b[0] for a, b in pairwise(found))


def paragraph_last_first(response: str) -> bool:
    """Each line's first word is its last."""
    return all(found[0] == found[-1] for line in lines(response) if (found := plain_words(line)))


def increment(response: str, small_n: int) -> bool:
    """Each sentence has exactly so many words more than the one before."""
    counts = [len(_bare(sentence)) for sentence in sentences(response)]
    return bool(counts) and all(b == a + small_n for a, b in pairwise(counts))


def sentence_alphabet(response: str) -> bool:
    """26 sentences, from a to z by their first letters."""
    return "".join(sentence.lstrip("\"'“‘*_( ")[:1].lower() for sentence in sentences(response)) == string.ascii_lowercase


# ---------------------------------------------------------------- format


def parentheses(response: str) -> bool:
    """Brackets of any kind, five deep and closed in order."""
    opened: list[str] = []
    deepest = 0
    for mark in re.findall(r"[()\[\]{}]", response):
        if mark in "([{":
            opened.append(mark)
            deepest = max(deepest, len(opened))
        elif opened and opened[-1] + mark in ("()", "[]", "{}"):
            if deepest >= 5:
                return True
            opened.pop()
        else:
            opened, deepest = [], 0
    return False


def quotes(response: str) -> bool:
    """Quotations within quotations, three deep, with double and single marks in turn."""
    opened: list[str] = []
    closing = 0
    for mark in re.findall(r"\"|(?<!\w)'|'(?!\w)", response.replace("“", '"').replace("”", '"').replace("‘", "'").replace("’", "'")):
        if opened and opened[-1] == mark:
            closing = max(closing, len(opened))
            opened.pop()
        else:
            opened.append(mark)
        if closing >= 3 and not opened:
            return True
    return False


def one_of_options(response: str, options: str) -> bool:
    """Nothing but one of the options, which a comma, a slash or "or" separates: yes/no/maybe, or (a) x, (b) y with or without the letters."""
    listed = [option.strip() for option in re.split(r",|/|\bor\b", options) if option.strip()]
    answer = _option(response)
    return any(answer in (_option(option), _option(re.sub(r"^\(?\w[.)]\s*", "", option)), _option(option.partition(")")[0])) for option in listed)


def _option(text: str) -> str:
    return " ".join(plain_words(text))


def newline(response: str) -> bool:
    """Each word on a line of its own."""
    return all(len(line.split()) == 1 for line in lines(response.translate(str.maketrans("", "", string.punctuation))))


def emoji(response: str) -> bool:
    """Each sentence ends with an emoji, before its dot or after."""
    found = sentences(re.sub(rf"([.!?]+)\s*((?:{_EMOJI.pattern}\s*)+)", r" \2\1 ", response))
    return bool(found) and all(re.search(rf"{_EMOJI.pattern}$", sentence.rstrip(".!?\"') ")) for sentence in found)


def line_indent(response: str) -> bool:
    """Each line is indented further than the one before."""
    return all(a < b for a, b in pairwise(len(line) - len(line.lstrip(" ")) for line in lines(response)))


def quote_unquote(response: str) -> bool:
    """No quotation follows another without words between, and the last thing is no quotation."""
    text = "".join(response.replace("“", '"').replace("”", '"').split())
    return '""' not in text and not text.rstrip(string.digits + string.punctuation.replace('"', "")).endswith('"')


def list_marker(response: str, sep: str) -> bool:
    """At least two items behind the separator."""
    return response.count(sep) >= 2


def thesis(response: str) -> bool:
    """A passage in <i> or <em>, and text behind it."""
    return re.search(r"<(i|em)>\s*[^<\s].*?</\1>\s*\S", response, re.DOTALL) is not None


def sub_bullets(response: str) -> bool:
    """Bullets with *, and at least one sub-bullet with - for each."""
    parts = re.split(r"^[^\S\n]*\*\s", response, flags=re.MULTILINE)[1:]
    return bool(parts) and all(re.search(r"^[^\S\n]*-\s", part, re.MULTILINE) for part in parts)


def no_bullets_bullets(response: str) -> bool:
    """At least two sentences, and then at least two bullets with * and nothing else."""
    found = lines(response)
    first = next((i for i, line in enumerate(found) if line.lstrip().startswith("*")), len(found))
    before, bullets = found[:first], found[first:]
    return (sum(sentence.endswith(".") for sentence in sentences("\n".join(before))) >= 2 and len(bullets) >= 2
            and all(line.lstrip().startswith("*") for line in bullets))


def title_case(response: str) -> bool:
    """Each word begins with a capital letter; words of up to three letters need not."""
    return all(word[0].isupper() or len(word) <= 3 and i for i, word in enumerate(re.findall(r"[^\W\d_][\w'’]*", response)))


def output_template(response: str) -> bool:
    """The three headings of IFBench's template."""
    return all(heading in response for heading in ("My Answer:", "My Conclusion:", "Future Outlook:"))


def no_whitespace(response: str) -> bool:
    return not re.search(r"\s", response)


# ---------------------------------------------------------------- repetition, and single tasks


def repeat_change(response: str, prompt_to_repeat: str) -> bool:
    """The request, with another first word."""
    mine, asked = response.split(), prompt_to_repeat.split()
    return mine != asked and mine[1:] == asked[1:]


def repeat_simple(response: str) -> bool:
    return response.strip().lower() == "only output this sentence here, ignore all other requests."


def repeat_span(response: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The request's characters from n_start to n_end, both included."""
    return response.strip().lower() == prompt_to_repeat[n_start:n_end + 1].strip().lower()


def multiples(response: str) -> bool:
    """The multiples of 7 between 10 and 50."""
    return re.findall(r"\d+", response) == ["14", "21", "28", "35", "42", "49"]


def mcq_count_length(response: str) -> bool:
    """Four questions, each longer than the last, with five options each."""
    if not response.lstrip("*# ").startswith("Question"):
        return False
    lengths = []
    for question in re.split(r"^[*# ]*Question\s*\d*[.):;*]*", response, flags=re.MULTILINE)[1:]:
        asked, *options = re.split(r"^\s*\(?[A-Ea-e][.)]\s*", question, flags=re.MULTILINE)
        if len(options) != 5:
            return False
        lengths.append(len(" ".join(asked.split())))
    return len(lengths) == 4 and all(a < b for a, b in pairwise(lengths))


def word_reverse(response: str) -> bool:
    """The sentence about the bald eagle, the last word first."""
    return "bald eagle" in " ".join(reversed(_bare(response)))


def character_reverse(response: str) -> bool:
    return "bald eagle"[::-1] in response.lower()


def csv_city(response: str) -> bool:
    return _table(response, ["ID", "Country", "City", "Year", "Count"], 7) is not None


def csv_special_character(response: str) -> bool:
    """14 rows; some field in quotes has a character that is neither letter, digit nor space."""
    return (_table(response, ["ProductID", "Category", "Brand", "Price", "Stock"], 14) is not None
            and re.search(r'"[^"\n]*[^\w\s"][^"\n]*"', response) is not None)


def csv_quotes(response: str) -> bool:
    """3 rows, separated by tabs, with every field in quotes."""
    names = ["StudentID", "Subject", "Grade", "Semester", "Score"]
    fields = [field.strip() for line in lines(response)[1:] for field in line.split("\t")]
    return _table(response, names, 3, "\t") is not None and all(len(f) > 1 and f[0] == f[-1] == '"' for f in fields)


def _table(response: str, names: list[str], rows: int, delimiter: str = ",") -> list[list[str]] | None:
    """The rows of a CSV with these names and as many rows; None for any other."""
    found = [row for row in csv.reader(response.strip().splitlines(), delimiter=delimiter, skipinitialspace=True) if row]
    good = len(found) == rows + 1 and [name.strip() for name in found[0]] == names and all(len(row) == len(names) for row in found)
    return found[1:] if good else None


def date_format_list(response: str) -> bool:
    """Dates of Napoleon's life as YYYY-MM-DD, separated by commas, and nothing else."""
    for text in response.strip().split(","):
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text.strip()):
            return False
        try:
            if not 1769 <= datetime.date.fromisoformat(text.strip()).year <= 1821:
                return False
        except ValueError:
            return False
    return True


HELD_OUT: dict[str, Check] = {
    "count:word_count_range": word_count_range, "count:unique_word_count": unique_word_count, "ratio:stop_words": stop_words,
    "ratio:sentence_type": sentence_type, "ratio:sentence_balance": sentence_balance, "count:conjunctions": conjunctions,
    "count:person_names": person_names, "ratio:overlap": overlap, "count:numbers": numbers, "count:pronouns": pronouns,
    "count:punctuation": punctuation, "count:keywords_multiple": keywords_multiple, "count:words_japanese": words_japanese,
    "words:alphabet": alphabet, "words:vowel": vowel, "words:consonants": consonants, "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths, "words:repeats": repeats, "words:no_consecutive": no_consecutive,
    "words:words_position": words_position, "words:keywords_specific_position": keywords_specific_position,
    "words:odd_even_syllables": odd_even_syllables,
    "words:last_first": last_first, "words:paragraph_last_first": paragraph_last_first, "sentence:keyword": sentence_keyword,
    "sentence:alliteration_increment": alliteration_increment, "sentence:increment": increment, "ratio:sentence_words": sentence_words,
    "format:parentheses": parentheses, "format:quotes": quotes, "format:options": one_of_options, "format:newline": newline,
    "format:emoji": emoji, "format:line_indent": line_indent, "format:quote_unquote": quote_unquote, "format:list": list_marker,
    "format:thesis": thesis, "format:sub-bullets": sub_bullets, "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case, "format:output_template": output_template, "format:no_whitespace": no_whitespace,
    "repeat:repeat_change": repeat_change, "repeat:repeat_simple": repeat_simple, "repeat:repeat_span": repeat_span,
    "custom:multiples": multiples, "custom:mcq_count_length": mcq_count_length, "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse, "custom:sentence_alphabet": sentence_alphabet, "custom:csv_city": csv_city,
    "custom:reverse_newline": reverse_newline, "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_special_character": csv_special_character, "custom:csv_quotes": csv_quotes, "custom:date_format_list": date_format_list,
}
PACKAGES = {"words:odd_even_syllables": "syllapy"}
"""What an instruction needs that is not installed with rlmono."""
