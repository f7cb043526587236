"""ifbench: every instruction with a response that follows it and one that does not, by hand; and its metadata."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rlmono.data.sample import Sample
from rlmono.rewards import ifbench
from rlmono.rewards.ifbench.held_out import HELD_OUT, PACKAGES
from rlmono.rewards.ifbench.ifeval import IFEVAL
from rlmono.rewards.ifbench.language import language_of
from rlmono.rewards.ifbench.text import holds, sentences

THREE = "One two three."
AFRICA = "\n".join(f"- {name}" for name in sorted("""
    Algeria, Angola, Benin, Botswana, Burkina Faso, Burundi, Cabo Verde, Cameroon, Central African Republic, Chad, Comoros, Côte d'Ivoire,
    Democratic Republic of the Congo, Djibouti, Egypt, Equatorial Guinea, Eritrea, Eswatini, Ethiopia, Gabon, Gambia, Ghana, Guinea, Guinea-Bissau,
    Kenya, Lesotho, Liberia, Libya, Madagascar, Malawi, Mali, Mauritania, Mauritius, Morocco, Mozambique, Namibia, Niger, Nigeria,
    Republic of the Congo, Rwanda, São Tomé and Príncipe, Senegal, Seychelles, Sierra Leone, Somalia, South Africa, South Sudan, Sudan, Tanzania,
    Togo, Tunisia, Uganda, Zambia, Zimbabwe""".replace("\n   ", "").strip().split(", "),
    key=lambda name: name.replace("ã", "a").replace("ô", "o"), reverse=True)) + "\n"
CAPITALS = ("Reykjavík, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, Amsterdam, Warsaw, London, "
            "Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chișinău, Bern, Ljubljana, Zagreb")
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Berlin", "spree"]}, "In berlin flows the Spree.", "In Berlin flows a river."),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "Cat and cats", "one cat"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "one cat", "cat cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["no", "never"]}, "I know nothing", "I say No."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 3, "let_relation": "at least"}, "Zzz", "zoo zoo"),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Weg, den ich für dich habe.", "That is not the way that I have for you."),
    ("language:response_language", {"language": "hi"}, "यह एक अच्छा दिन है और हम को पानी में जाना है", "हे एक चांगला दिवस आहे आणि ते होते"),
    ("length_constraints:number_sentences", {"num_sentences": 2},
     "It is 3.5 m. Dr. Who said so!", "Dr. Who, e.g. here, said 3.5."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "First.\n***\nSecond.", "First.\n\nSecond."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nFirst.\n***\nSecond.\n***", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, THREE, "One two three four."),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "But"},
     "So.\n\n\"but\" no.", "But.\n\nSo."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name] of town"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yours\nP. S. I forgot", "Yours, PSI"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Yours\nP.P.S. more", "Yours\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* and two**"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "Section 1\na\nSection"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one ****** two ****** three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Who am I?"}, "Who am I? You are you.", "You are you."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'So. "Any Questions?"', "Any questions? No."),
    ("startend:quotation", {}, '"All of it."', '"Some" of it.'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "NASA and ESA", "NASA and Esa"),
    ("change_case:english_capital", {}, "THIS IS THE WAY OF IT.", "THIS IS the WAY."),
    ("change_case:english_lowercase", {}, "this is the way of it.", "This is the way."),
    ("punctuation:no_comma", {}, "one and two", "one, two"),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, THREE, "One two three four"),
    ("count:unique_word_count", {"N": 3}, THREE, "One, one: two one."),
    ("ratio:stop_words", {"percentage": 50}, "the cat", "the cat is here"),
    ("ratio:sentence_type", {}, "A cat. A dog. A cow?", "A cat. A dog?"),
    ("ratio:sentence_balance", {}, "A cat. A dog! A cow?", "A cat. A dog! A cow."),
    ("count:conjunctions", {"small_n": 3}, "And so, but no", "and And so"),
    ("count:person_names", {"N": 2}, "Emma met Liam.", "Emma met Emma and Emily"),
    ("ratio:overlap", {"reference_text": "a b c d", "percentage": 50}, "a b c x", "a b c d"),
    ("count:numbers", {"N": 2}, "From 1,000 to 3.5 in x2", "1 2 3"),
    ("count:pronouns", {"N": 3}, "I gave it to them", "I gave the book to Ann"),
    ("count:punctuation", {}, "What?! So; yes: a, b. Really? No!", "What?! So; yes: a, b. No."),
    ("count:keywords_multiple", {f"keyword{i}": k for i, k in enumerate("abcde", 1)}, "a b b c c c d d d d d e e e e e e e", "a b c d e"),
    ("count:words_japanese", {"N": 2}, "one ねこ two 犬", "one two"),
    ("words:alphabet", {}, "Yes, zebras are big", "Yes, are big"),
    ("words:vowel", {}, "an old banana", "our old banana is unique"),
    ("words:consonants", {}, "strong thing", "a thing"),
    ("words:palindrome", {}, "level radar kayak civic madam refer rotor tenet stats sagas", "level radar noon"),
    ("words:prime_lengths", {}, "it was seven", "a four"),
    ("words:repeats", {"small_n": 2}, "go, go now", "go go go"),
    ("words:no_consecutive", {}, "one cat ran", "one old cat"),
    ("words:words_position", {"keyword": "blue"}, "The blue sky is blue today.", "The blue sky is today blue."),
    ("words:keywords_specific_position", {"keyword": "dog", "n": 2, "m": 3}, "Hi. I see dog.", "Hi. I dog see."),
    ("words:last_first", {}, "I see cats. Cats see me.", "I see cats. They see me."),
    ("words:paragraph_last_first", {}, "Now it is now.\nGo and go!", "Now it is.\nGo and go!"),
    ("sentence:keyword", {"word": "sun", "N": 2}, "Hello. The sun shines.", "The sun shines. Hello. Sunday"),
    ("sentence:alliteration_increment", {}, "A cat. Big bad dog. So some sad song.", "Big bad boys. A cat."),
    ("sentence:increment", {"small_n": 1}, "I am. You are too.", "I am. You are."),
    ("ratio:sentence_words", {}, "I am so. He went. You are.", "I am. He was. You went."),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c (d)}])"),
    ("format:quotes", {}, "\"He said 'she said \"no\" twice' once\"", "\"He said 'no' once\""),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "Maybe, or not"),
    ("format:options", {"options": "(a) red, (b) blue"}, "(b)", "(c)"),
    ("format:newline", {}, "one\ntwo\n\nthree.", "one two"),
    ("format:emoji", {}, "Hello there. 😀 It is late 🌙.", "Hello there. It is late 🌙."),
    ("format:line_indent", {}, "a\n b\n   c", "a\n b\n b"),
    ("format:quote_unquote", {}, 'He said "no" to it.', 'He said "no" "never" to it.'),
    ("format:list", {"sep": "!?!?"}, "!?!? a\n!?!? b", "- a\n- b"),
    ("format:thesis", {}, "<i>It is so.</i> Because.", "<i> </i> It is so."),
    ("format:sub-bullets", {}, "* a\n  - b\n* c\n  - d", "* a\n  - b\n* c"),
    ("format:no_bullets_bullets", {}, "One. Two.\n* a\n* b", "One.\n* a\n* b"),
    ("format:title_case", {}, "The Lord of the Rings", "The lord of the Rings"),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a"),
    ("format:no_whitespace", {}, "onetwo", "one two"),
    ("repeat:repeat_change", {"prompt_to_repeat": "Write a poem"}, "Sing a poem", "Write a poem"),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "Only this."),
    ("repeat:repeat_span", {"prompt_to_repeat": "Write a poem", "n_start": 6.0, "n_end": 7.0}, "a", "a poem"),
    ("custom:multiples", {}, "14, 21, 28, 35, 42, 49", "7, 14, 21, 28, 35, 42, 49"),
    ("custom:mcq_count_length", {}, "\n".join(f"Question {i}. {'why ' * i}?\n" + "\n".join(f"{c}) x" for c in "ABCDE") for i in range(1, 5)),
     "\n".join(f"Question {i}. why?\n" + "\n".join(f"{c}) x" for c in "ABCDE") for i in range(1, 5))),
    ("custom:word_reverse", {}, "eagle bald the is it", "it is the bald eagle"),
    ("custom:character_reverse", {}, ".elgae dlab ehT", "The bald eagle."),
    ("custom:sentence_alphabet", {}, " ".join(f"{chr(65 + i)}n it is so." for i in range(26)), "An it is so. Bn it is so."),
    ("custom:csv_city", {}, "ID,Country,City,Year,Count\n" + "1,a,b,2000,3\n" * 7, "ID,Country,City,Year,Count\n" + "1,a,b,2000,3\n" * 6),
    ("custom:csv_special_character", {}, "ProductID,Category,Brand,Price,Stock\n" + '1,"a & b",c,2,3\n' * 14,
     "ProductID,Category,Brand,Price,Stock\n" + "1,a,c,2,3\n" * 14),
    ("custom:csv_quotes", {}, '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"\n' + '"1"\t"a"\t"b"\t"c"\t"2"\n' * 3,
     "StudentID\tSubject\tGrade\tSemester\tScore\n" + "1\ta\tb\tc\t2\n" * 3),
    ("custom:reverse_newline", {}, AFRICA, AFRICA.replace("- Togo\n", "")),
    ("custom:european_capitals_sort", {}, CAPITALS, CAPITALS.replace("Riga, Moscow", "Moscow, Riga")),
    ("words:odd_even_syllables", {}, "The water is never cold.", "The cold water."),
    ("custom:date_format_list", {}, "1796-05-10, 1815-06-18", "1796-05-10, 1815-06-31"),
]


@pytest.mark.parametrize("id, kwargs, follows, does_not", CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_followed_or_not(id: str, kwargs: dict[str, Any], follows: str, does_not: str) -> None:
    if id in PACKAGES:
        pytest.importorskip(PACKAGES[id], reason=f"pip install 'rlmono[ifbench]' for {id}")
    metadata = {"instruction_id_list": [id], "kwargs": [{**kwargs, "of_another": None}]}
    assert ifbench.reward(None, Sample(response=follows, metadata=metadata)) == 1.0
    assert ifbench.reward(None, Sample(response=does_not, metadata=metadata)) == 0.0


def test_every_instruction_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(ifbench.INSTRUCTIONS)
    assert len(IFEVAL) == 25 and len(HELD_OUT) == 57 and not set(IFEVAL) & set(HELD_OUT)


def test_all_of_them_must_be_followed_after_the_thinking() -> None:
    metadata = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": json.dumps([None, {"num_words": 2.0, "relation": "at least"}])}
    for response, value in (("one two", 1.0), ("one, two", 0.0), ("one", 0.0), ("<think>well, one, two</think>one two", 1.0), ("", 0.0),
                            ("<think>one two", 1.0), ("one two<|im_end|>", 1.0), ("<|im_end|>", 0.0)):
        assert ifbench.reward(None, Sample(response=response, metadata=metadata)) == value, response


@pytest.mark.parametrize("metadata, text", [
    ({}, "the metadata has no instruction_id_list"), ({"instruction_id_list": []}, "no instruction_id_list"),
    ({"instruction_id_list": ["words:start_verb"]}, "the instruction 'words:start_verb' is unknown; there are change_case:capital_word_frequency"),
    ({"instruction_id_list": ["keywords:existence"]}, "the kwargs of keywords:existence lack keywords"),
    ({"instruction_id_list": ["keywords:frequency"], "kwargs": [{"keyword": "a", "frequency": None}]},
     "the kwargs of keywords:frequency lack frequency"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "kwargs must be a list of 1 objects"),
])
def test_metadata_that_cannot_be_checked_is_refused(metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        ifbench.check(None, metadata)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "words:odd_even_syllables", "no_such_package")
    with pytest.raises(ValueError, match=re.escape("words:odd_even_syllables needs the package no_such_package: pip install 'rlmono[ifbench]'")):
        ifbench.check(None, {"instruction_id_list": ["words:odd_even_syllables"]})


def test_a_wrong_argument_says_so() -> None:
    with pytest.raises(ValueError, match="the language 'xx' can't be told; those that can are ar, bg"):
        ifbench.reward(None, Sample(response="a", metadata={"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]}))
    with pytest.raises(ValueError, match="the relation 'about' is none of"):
        holds(1, "about", 2)
    assert [holds(2, r, 2) for r in ("at least", "less than", "at most", "more than", "exactly")] == [True, False, True, False, True]


@pytest.mark.parametrize("text, code", [
    ("The cat sat on the mat and it was not happy with that.", "en"), ("Le chat est sur la table et il ne veut pas de lait dans une tasse.", "fr"),
    ("El gato está en la mesa y no quiere la leche que le han dado.", "es"), ("O gato está na mesa e não quer o leite que foi dado para ele.", "pt"),
    ("Il gatto è sul tavolo e non vuole il latte che gli hanno dato.", "it"), ("Kissa on pöydällä ja se ei juo, mutta hän kyllä joi.", "fi"),
    ("Kot jest na stole i nie chce mleka, ale to się zmieni.", "pl"), ("Con mèo của tôi không có ở trong nhà và một người đã cho nó ăn.", "vi"),
    ("Paka wangu yuko katika nyumba ya rafiki na ni mzuri kwa watoto.", "sw"),
    ("Кот сидит на столе, и он не хочет молока, как это было у нас.", "ru"),
    ("Котката е на масата и не иска да се движи от това място.", "bg"), ("Кіт сидить на столі, і він не хоче молока, але це було так.", "uk"),
    ("القط على الطاولة ولا يريد أن يشرب من هذا الكوب", "ar"), ("گربه روی میز است و نمی خواهد که از این فنجان را بنوشد", "fa"),
    ("بلی میز پر ہے اور وہ اس کے دودھ کو نہیں چاہتی", "ur"), ("猫はテーブルの上にいます。", "ja"), ("这只猫在桌子上，它不想喝牛奶。", "zh"),
    ("고양이가 탁자 위에 있다", "ko"), ("แมวอยู่บนโต๊ะ", "th"), ("பூனை மேசையில் உள்ளது", "ta"), ("123 !", None), ("Xyzzy plugh", None),
])
def test_languages(text: str, code: str | None) -> None:
    assert language_of(text) == code


@pytest.mark.parametrize("text, number", [
    ("One. Two! Three? Four…", 4), ("Mr. J. Smith, Ph.D., paid 3.50 at 5 p.m. in St. Louis.", 1), ('He said "Go." Then he went.', 2),
    ("1. First\n2. Second", 1),
    ("A heading\n\nA sentence.", 2), ("No end", 1), ("", 0), ("It was 1999. Then it was not.", 2), ("猫です。犬です。", 2), ("Really?! Yes...", 2),
])
def test_sentences(text: str, number: int) -> None:
    assert len(sentences(text)) == number
