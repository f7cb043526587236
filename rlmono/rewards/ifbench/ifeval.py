"""IFEval's 25 verifiable instructions (arXiv:2311.07911, table 1), by their ids and with their data's argument names."""

from __future__ import annotations

import json
import re
import string

from rlmono.rewards.ifbench.language import LANGUAGES, language_of
from rlmono.rewards.ifbench.text import Check, holds, paragraphs, sentences, words


def existence(response: str, keywords: list[str]) -> bool:
    """All keywords occur, in capitals or not."""
    return all(keyword.lower() in response.lower() for keyword in keywords)


def frequency(response: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return holds(response.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return holds(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


def response_language(response: str, language: str) -> bool:
    """The whole is in the language of an ISO code. ValueError for one that can't be told."""
    code = language.partition("-")[0].lower()
    if code not in LANGUAGES:
        raise ValueError(f"ifbench: the language {language!r} can't be told; those that can are {', '.join(sorted(LANGUAGES))}")
    return language_of(response) == code


def number_sentences(response: str, num_sentences: int, relation: str = "at least") -> bool:
    return holds(len(sentences(response)), relation, num_sentences)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by the divider ***."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    inner = parts[bool(not parts[0]):len(parts) - (len(parts) > 1 and not parts[-1])]
    return all(inner) and len(inner) == num_paragraphs


def number_words(response: str, num_words: int, relation: str = "at least") -> bool:
    return holds(len(words(response)), relation, num_words)


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs, separated by empty lines, and the n-th of them (from 1) begins with the word."""
    found = paragraphs(response)
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    return found[nth_paragraph - 1].split()[0].strip(string.punctuation + "“”‘’").lower() == first_word.strip().lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    """Placeholders are in square brackets, as in [address]."""
    return len(re.findall(r"\[[^\[\]]*\]", response)) >= num_placeholders


def postscript(response: str, postscript_marker: str = "P.S.") -> bool:
    """The marker stands somewhere, with or without spaces after its dots, and something follows."""
    between = r"\.\s?" if "." in postscript_marker else r"\s?"
    marker = between.join(re.escape(part) for part in re.findall(r"[^.\s]+", postscript_marker))
    return re.search(rf"(?<!\w){marker}(?!\w)[\s\S]*\w", response, re.IGNORECASE) is not None


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with * or -."""
    return len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-[^-\n])", response, re.MULTILINE)) == num_bullets


def constrained_response(response: str) -> bool:
    return any(option in response for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """Highlighted in markdown: *like this* or **like this**."""
    return len(re.findall(r"\*\*[^\n*]*[^\s*][^\n*]*\*\*|\*[^\n*]*[^\s*][^\n*]*\*", response)) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """Sections begin with the splitter and a number: "Section 1"."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole is JSON, in a fenced block or not."""
    body = re.sub(r"^```(?:json)?|```$", "", response.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """There is a title in double angular brackets, <<like this>>."""
    return any(line.partition("<<")[2].rpartition(">>")[0].strip("<> ") for line in response.split("\n"))


def two_responses(response: str) -> bool:
    """Two different answers, separated by six asterisks."""
    parts = [part.strip() for part in response.split("******")]
    answers = [part for part in parts if part]
    return len(answers) == 2 and answers[0] != answers[1] and all(parts[1:-1])


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The answer begins with the prompt, word by word."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """The whole is in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    """Words in capital letters throughout."""
    return holds(sum(word.isupper() for word in words(response)), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    return response.isupper() and language_of(response) in ("en", None)


def english_lowercase(response: str) -> bool:
    return response.islower() and language_of(response) in ("en", None)


def no_comma(response: str) -> bool:
    return "," not in response


IFEVAL: dict[str, Check] = {
    "keywords:existence": existence, "keywords:frequency": frequency, "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency, "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences, "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words, "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders, "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists, "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections, "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format, "detectable_format:title": title, "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt, "startend:end_checker": end_checker, "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency, "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase, "punctuation:no_comma": no_comma,
}
