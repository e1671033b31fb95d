"""File names: which words of the image they carry, and which were made by no person."""

import pytest

from meme_llava.prepare.inputs import read_bqb_name, read_plain_name

BQB_NAMES = {
    "00016鸽子-当鸽的怎么能骗你呢": "当鸽的怎么能骗你呢",
    "莲蓬头男孩00009-没有下一个": "没有下一个",
    "可爱男孩纸00008-你讲话的语气好冷漠-我的心好痛": "你讲话的语气好冷漠 我的心好痛",
    "柯南00060不要过来": "不要过来",
    "Emoji00143-你能把我碰倒手心了珍惜吗": "你能把我碰倒手心了珍惜吗",
    "Emoji00231-CanYouStopAngry": "CanYouStopAngry",
    "JOJO的奇妙冒险00021-有空就去健身房-总能打过承太郎": "有空就去健身房 总能打过承太郎",
    "鸽子00009-好的-ok-OK-Ok": "好的 ok OK Ok",
    "猫和老鼠00229-233": "233",
    "鬼灭之刃00010-可怜弱小又无助-我妻善逸-": "可怜弱小又无助 我妻善逸",
    "喷雾000016-变傻喷雾": "变傻喷雾",
    # Describes what is done; nothing in the name tells.
    "汪蛋00024-磕头": "磕头",
    # Saved from a chat and numbered; the image says something else.
    "鸽子00013-QQ图片20171201110816": None,
    "喷雾00014": None,
    "力量": None,
    "奥特曼00062-": None,
    "CuteGirl00191": None,
    "2018-02-03 090153(1)": None,
    "1598326112": None,
    "QQ图片20190915134640": None,
    "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283": None,
    "00173abc-4a6d-4f1f-8aa4-8b19aa6c2283": None,
    "J42XKP6JDI[6U{S@99ULQ2R": None,
    "v2-8b4d601de150f6dfd8184dbff1226062_hd": None,
}


@pytest.mark.parametrize("name, text", BQB_NAMES.items())
def test_chinese_bqb_names(name, text):
    assert read_bqb_name(name) == text


PLAIN_NAMES = {
    "有点意思，说下去": "有点意思，说下去",
    "好的(1)": "好的",
    "好的 （12）": "好的",
    "说人话B": "说人话B",
    "说出你的故事1": "说出你的故事1",
    "666": "666",
    "666666": "666666",
    "excuse me": "excuse me",
    "Six Six Six": "Six Six Six",
    "当场抓获，上班 8 小时，7 小时群里聊天": "当场抓获，上班 8 小时，7 小时群里聊天",
    "IMG_1234": None,
    "IMG_20190101_123456": None,
    "mmexport1598326112": None,
    "QQ图片20171201111744": None,
    "QQ截图20171201111842": None,
    "微信图片_20190101123456": None,
    "Screenshot_2019-01-01-12-00-00": None,
    "2018-09-06 084253": None,
    "1598326112": None,
    "3893CF102850A45F875F44276A24D9C2": None,
    "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283_2": None,
    "{4DD9A473-11DB-4F67-AA69-EB69B09C0ED6}": None,
    "TP0243O4W506)]]AC[UQ(W5": None,
    "Squirtle10": None,
    "IMG_1234(1)": None,
    "！！！": None,
    "": None,
}


@pytest.mark.parametrize("name, text", PLAIN_NAMES.items())
def test_plain_names(name, text):
    assert read_plain_name(name) == text
