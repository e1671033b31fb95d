"""Knows what memes say: lines for every mood, and an endless supply made from our own words and common characters.

A line is *written* (a phrase of ours), *composed* (a pattern filled with words), or *mixed* (words or single characters
without a meaning, which teach reading where guessing does not help). A bar marks where a long line breaks in two.

The words keep to about 700 characters, the ones most frequent in these lines and in real memes: few enough for small
towers to learn all of them from nothing on two CPU cores, and enough for six in seven characters of real memes.
"""

import random
import re
import zlib
from itertools import chain

PUNCTUATION = "，！？"
UNSEEN_SHARE = 8  # one line in so many is kept for pictures that no model has trained on

# What a meme of each mood says.
LINES = {
    "开心": """今天也要加油鸭 开心到转圈圈 奶茶|到了！ 快乐就完事了 发工资啦 今天的我|超甜 嘿嘿嘿嘿 干饭|时间到
        下班咯，拜拜 今天不加班 终于放假了 好运连连 笑死我了 哈哈哈哈 开心就好 太棒了吧 明天休息 幸福来敲门""",
    "难过": """我太难了 宝宝|心里苦 钱包|又空了 说好的周末呢 我的外卖|凉了 抱抱我好吗 眼泪|不值钱 没有人理我
        周一怎么又来了 呜呜呜呜 头发又|掉了一把 我哭了 心好累 伤心了 别管我，让我哭 今天又没人爱 生活好苦 委屈死了
        考试又没过 错过末班车""",
    "生气": """我要|生气了 谁动了|我的奶茶 不许笑！ 小本本记下了 别吵，我在生气 又要|加班？ 我超凶的 今天谁都别惹我
        气死我了 闭嘴！ 你完蛋了 不可原谅 绝交五分钟 马上给我道歉 你礼貌吗？ 警告一次""",
    "惊讶": """还有这种操作？ 我没|看错吧 吓到炸毛 天呐，这么贵 今天要考试？ 我的瓜呢 原来|是你！ 信息量有点大
        等等，我没听懂 作业是|今天交？ 真的假的？ 不会吧 我惊呆了 这也行？ 怎么回事 万万没想到 你认真的吗 还能这样？
        我的天呐""",
    "无语": """不知该说点啥 你开心就好 就这？ 我不想说话 已读，不回 尴尬而|不失礼貌 你说得都对 大可不必 这天|没法聊了
        收到，马上摸鱼 让我静静 无话可说 行吧 哦，知道了 呵呵 好的，下一个""",
    "得意": """不愧是我 低调，低调 这题我会 计划通 叫我|大聪明 求人|不如求我 我就是|这么优秀 掌声|在哪里 我真帅
        膜拜我吧 小意思啦 天才本人 厉害吧 学着点 机智如我""",
    "犯困": """再睡|五分钟 看见书就困 昨晚又熬夜了 晚安，好梦 咖啡|救救我 午饭后必困 电量只剩|一格 好困啊 我要睡觉
        起不来了 梦里见 先躺会儿 今天早点睡 醒了又睡 被子不让我起 凌晨三点还没睡""",
    "心动": """爱了爱了 给你|小心心 你好|可爱呀 想和你贴贴 送你一朵小红花 好喜欢你呀 心都要化了 被你|甜到了
        这是|心动的感觉 比个心，收下吧 见到你就脸红 请你|吃糖呀 偷偷|想你了 做我女朋友 想抱抱你 我养你啊 和我结婚吧
        亲亲 你笑起来真好看 只喜欢你""",
    "害怕": """你别过来啊 瑟瑟发抖 我怕了 吓死宝宝了 有话好好说 救命啊！ 后背发凉 我不敢动 老板在看我 妈妈我怕 别打我
        我错了还不行吗 快跑！ 有鬼啊 我先溜了 惹不起 晚上不敢看 身后有人 手在发抖 求放过""",
    "疑惑": """你在说什么？ 我是谁？ 我在哪？ 黑人问号 什么意思？ 为什么呢 你谁啊 我做错什么了 啥？ 这是什么东西
        看不懂 想不通 怎么说？ 有谁能解释一下 难道不是吗 这合理吗？ 在干嘛 哪里不对 所以呢？ 我怎么不知道 是我的错吗
        请问有事吗""",
}

# Patterns whose gaps the words below fill; they fit any mood.
PATTERNS = """{谁}{态}{动} {谁}又{动}了 {谁}{时}{动} {时}{动} {时}不{动} {谁}不想{动} {谁}只想{动} 一起{动}吧
        {谁}的{物}呢 {谁}的{物}没了 {物}真{样} {物}太{样}了 {谁}好{样}啊 {谁}怎么这么{样} {物}{样}吗？
        给{谁}{数}个{物} {数}个{物} {谁}要{物} {谁}爱{物} 没有{物}怎么{动} {叹}，{谁}{动}了 {叹}，{物}真{样} {叹}！
        {叹}{叹} {谁}说{物}{样} {时}{谁}要{动} {谁}和{谁}{动} 快{动} 别{动}了 {动}完再{动} {动}使我{样} {谁}不{样}
        {样}的{谁} {样}的{物} {谁}会{动}吗 {数}{量}{物} 还有{数}{量}{物} {谁}只剩{数}块钱 {动}{数}小时 {数}点{动}
        {数}分 {谁}是{样}的{物} 这个{物}有点{样} {谁}看{物} 先{动}，再{动} 边{动}边{动} {谁}在{地}{动} 去{地}{动}
        {地}见 {地}好{样} {谁}从{地}来 {英}{动} {谁}{英}了 {英} {谁}的{英} {谁}没有{英} {物}{英} {动}了{数}次
        {谁}什么时候{动} 我不是{谁} 因为{样}，所以{动} 不{动}就{动} 只有{物}才{样} 再{动}就{样}了 {谁}最{样}
        听说{谁}{动}了 {时}的{物} 请{谁}{动} 祝你{时}{样} 你的{物}{样}吗 {谁}居然{动} {物}归{谁} 让{谁}{动}
        {谁}很{样}，但{谁}不说 今天{动}，明天{动} {谁}终于{动} {物}和{物} 我要{动} 这就是{物} 你是{物}吗 把{物}给我"""

WORDS = {
    "谁": """我 你 他 她 我们 你们 大家 老板 老师 妈妈 爸爸 宝宝 朋友 小猫 小狗 熊猫 同学 同事 兄弟 姐姐 哥哥 妹妹
        弟弟 奶奶 爷爷 老公 老婆 先生 小姐 美女 帅哥 经理 医生 警察 司机 男人 女人 孩子 客户 程序员 产品经理 学生 群主
        网友 主人 皇上 公主 王子 英雄 高手 傻子 猪 鸭子 鸽子 鹦鹉 老虎 青蛙 兔子 狐狸 本人 自己 别人 敌人 单身狗
        小朋友 大佬 大哥 陛下 亲爱的 隔壁老王 家人们 咱们""",
    "态": """正在 马上 已经 还没 偷偷 认真 继续 努力 终于 慢慢 赶紧 天天 一直 从不 必须 应该 可能 好像 真的 假装 重新
        打算 喜欢 害怕 不敢""",
    "动": """吃饭 睡觉 上班 下班 加班 摸鱼 学习 写作业 考试 开会 减肥 跑步 游泳 跳舞 喝茶 喝水 喝酒 喝奶茶 买菜 买单
        做饭 洗碗 洗澡 洗头 刷牙 起床 出门 回家 搬家 赚钱 花钱 还钱 发财 发工资 发红包 抢红包 充电 关机 上网 打游戏
        看书 看电影 看戏 听歌 拍照 自拍 聊天 打电话 发呆 做梦 思考 生气 哭 笑 谈恋爱 结婚 分手 表白 撒娇 抱抱 投降
        逃跑 躺平 打工 搬砖 写代码 改需求 修电脑 迟到 请假 辞职 旅行 爬山 晒太阳 淋雨 感冒 吃药 打针 住院 开车 坐车
        骑车 走路 飞 排队 付款 退货 拆快递 点外卖 吃火锅 吃鸡 吃瓜 养猫 遛狗 种花 浇水 钓鱼 讲故事 吵架 打架 道歉 原谅
        感谢 祝福 解释 撤回 截图 转发 点赞 关注 举报 撒谎 吹牛 装傻 干活 休息 冷静 投票 毕业 报名 面试 签到 打卡 练字
        画画 背单词 早起 熬夜 复习 数钱 做人 说话 闭嘴 滚蛋 回复 算账 剪头发 化妆 照镜子 变身 升级 登录 抓人 拜年 过年
        斗图""",
    "物": """奶茶 咖啡 面包 面条 包子 火锅 鱼 牛肉 西瓜 白菜 糖 早饭 午饭 晚饭 外卖 快递 手机 电脑 耳机 电视 空调 沙发
        床 枕头 被子 眼镜 书包 钱包 钱 红包 工资 奖金 作业 问题 代码 需求 文件 合同 表情包 头发 眼睛 嘴 耳朵 手 脚
        脑子 肌肉 脸 心 梦想 爱情 友情 生活 人生 时间 青春 运气 机会 计划 目标 故事 歌 电影 游戏 花 草 山 水 火 风 雨
        太阳 月亮 星星 天空 海 飞机 火车 自行车 房子 门 桌子 杯子 碗 笔 书 地图 药 镜子 牙 锅 瓜 酒 智商 人品 良心
        底线 理由 消息 信号 密码 身份证 排名 体重 假期 周末 天气 温度 毛病 套路 格局 语文 数学""",
    "样": """开心 快乐 难过 伤心 生气 无聊 无语 得意 困 累 冷 热 酸 甜 苦 辣 香 大 小 多 少 高 胖 长 快 慢 新 美 丑 帅
        可爱 漂亮 聪明 笨 傻 厉害 特别 重要 容易 困难 安全 奇怪 正常 完美 真实 自由 凶 尴尬 紧张 激动 满意 失望 冷静
        优秀 努力 忙 穷 有钱 贵 好吃 好看 好听 好玩 强 弱 软 亮 黑 白 红 幸福 绝望 低调 委屈 感动 清醒 佛系 熟 讲道理
        没文化 靠谱 离谱 要命 安静 吵 远 近 单纯 成熟""",
    "时": """今天 明天 昨天 后天 早上 中午 下午 晚上 凌晨 周一 周五 周末 上午 现在 刚才 以后 以前 每天 下次 上次 春天
        冬天 过年 这辈子 下辈子 小时候 下个月 去年 明年 假期 深夜 星期天 第一次 最后一次""",
    "叹": """啊 哦 嗯 哎呀 天呐 嘿嘿 哈哈 呵呵 呜呜 加油 救命 再见 拜拜 谢谢 对不起 没关系 好的 收到 可以 不行 安排
        懂了 行吧 算了 真香 完了 厉害 佩服 告辞 打扰了 略略略 走开 早安 晚安 你好 不要 是的 没错 当然 滚 来了 溜了""",
    "数": """一 两 三 四 五 六 八 九 十 百 千 万 0 1 2 3 5 6 7 8 9 10 12 18 20 24 30 50 66 88 99 100 250 520 666 996
        1314 2024 3.5 0.1""",
    "量": """个 只 条 张 次 天 年 块 杯 碗 口 件 本 把 分 秒 群 朵 位""",
    "地": """家 公司 教室 床上 地上 天上 路上 车上 海边 山顶 医院 上海 火星 中国 梦里 群里 朋友圈 网上 门口 机场 北方
        操场 办公室 心里""",
    "英": """OK NO BUG APP GG VIP CEO KTV PPT 520 emo PK MVP hello bye AI IT UP 4G 5G hi ok no yes come on low cool""",
}


def list_alphabet() -> list[str]:
    """Every character that a line may hold, in a fixed order."""
    words = chain(*WORDS.values(), *LINES.values(), re.sub(r"{.}", "", PATTERNS))
    return sorted(set(words) - set("| \n"))


def is_unseen(line: str) -> bool:
    """Whether a line is kept for pictures that no model has trained on; the line itself decides it for good."""
    return zlib.crc32(line.replace("|", "").encode()) % UNSEEN_SHARE == 0


class LineSource:
    """Lines without end, each once.

    Args:
        unseen: only lines that the other half of the world never gets; else only the others.
    """

    def __init__(self, unseen: bool):
        self.unseen = unseen
        self._words = {kind: words.split() for kind, words in WORDS.items()}
        self._patterns = PATTERNS.split()
        self._all_words = list(chain(*self._words.values()))
        self._alphabet = list_alphabet()
        self._beginnings = [character for character in self._alphabet if character not in PUNCTUATION]
        self._given: set[str] = set()

    def next_line(self, rng: random.Random, mood: str) -> str:
        """A new line for a meme of that mood: written, composed or mixed."""
        while True:
            kind = rng.choices(("written", "composed", "mixed"), (3, 7, 1))[0]
            if kind == "written":
                line = rng.choice(LINES[mood].split())
            elif kind == "composed":
                line = self.compose(rng)
            else:
                line = self.mix(rng)
            text = line.replace("|", "")
            if len(text) <= 16 and text not in self._given and is_unseen(line) == self.unseen:
                self._given.add(text)
                return line

    def compose(self, rng: random.Random) -> str:
        """A pattern with its gaps filled."""
        line = rng.choice(self._patterns)
        while "{" in line:
            start, end = line.index("{"), line.index("}")
            line = line[:start] + rng.choice(self._words[line[start + 1 : end]]) + line[end + 1 :]
        return line

    def mix(self, rng: random.Random) -> str:
        """Words one after the other, or characters of the alphabet, up to twelve."""
        length = rng.randint(1, 12)
        if rng.random() < 0.5:
            return self.draw_characters(rng, length)
        line = ""
        while len(line) < length:
            line += rng.choice(self._all_words)
        return line

    def draw_characters(self, rng: random.Random, count: int) -> str:
        """Characters of the alphabet, each as likely as the others; no punctuation in front."""
        return "".join(rng.choice(self._beginnings if index == 0 else self._alphabet) for index in range(count))
