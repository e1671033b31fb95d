"""What memes say: lines for every mood, and an endless supply made from our own words and common characters.

A line is *written* (a phrase of ours), *composed* (a pattern filled with words), or *mixed* (words or single characters
without a meaning, which teach reading where guessing does not help). A bar marks where a long line breaks in two.

Only lines that keep to ALPHABET are given: 169 characters, the ones most frequent in these lines and in real memes,
few enough for small towers to learn all of them from nothing in some hours on two CPU cores, and enough for 56 % of the
characters of real memes. A wider ALPHABET gives more of the lines below; all of them need 439 characters.
"""

import random
import re
import zlib
from collections.abc import Iterable
from itertools import chain

PUNCTUATION = "，！？"
# Lines with any other character are left out.
ALPHABET = PUNCTUATION + (
    "0124569G一上下不个为主么书了事于亮人什今以们会你候假做傻先公再冷分别到包去又友发只可吃同后吗"
    "吧听呢周和哈哥啊喝嘿回困在大天太女奶好妈妹姐子学安完宝家小就工帅年床开弟张得心快怎情想戏我所手才打抱"
    "早时明星是最有朋本机来架梦次气没火点爱狗王班理瓜生电的看真睡祝红终给网美群老考能自茶行表要见让试话说"
    "请起身车边过还这道里钱锅错难静饭"
)
LONGEST_LINE = 12  # characters
UNSEEN_SHARE = 8  # one line in N is kept for images that no model has trained on

# What a meme of each mood says.
LINES = {
    "开心": """奶茶|到了！ 快乐就完事了 发工资啦 嘿嘿嘿嘿 干饭|时间到 今天不加班 终于放假了 笑死我了 哈哈哈哈 开心就好
        太棒了吧 今天好开心啊 发红包啦 可以回家啦 太好玩了 生活|真美好 明天过年""",
    "难过": """我太难了 钱包|又空了 说好的周末呢 抱抱我好吗 没有人理我 周一怎么又来了 呜呜呜呜 我哭了 心好累
        别管我，让我哭 今天又没人爱 委屈死了 考试又没过 错过末班车 手机|又没电了""",
    "生气": """我要|生气了 谁动了|我的奶茶 小本本记下了 别吵，我在生气 又要|加班？ 气死我了 闭嘴！ 我真的|生气了
        你给我出去 不和你玩了 别和我说话 再也|不理你了 没完没了 你想打架吗？ 看我不打你 你才傻""",
    "惊讶": """还有这种操作？ 我没|看错吧 今天要考试？ 我的瓜呢 原来|是你！ 真的假的？ 不会吧 这也行？ 怎么回事
        万万没想到 还能这样？ 这是真的吗 你说什么？ 怎么可能 我看到|什么了""",
    "无语": """你开心就好 就这？ 我不想说话 你说得都对 让我静静 无话可说 行吧 哦，知道了 呵呵 好的，下一个 我没话说了
        你行你上 好吧好吧 你说是|就是吧 不想理你 当我没说""",
    "得意": """低调，低调 这题我会 求人|不如求我 我就是|这么优秀 我真帅 小意思啦 天才本人 厉害吧 学着点 机智如我
        我可太厉害了 还得是我 看我的 我才是|高手 谁说我不行""",
    "犯困": """看见书就困 晚安，好梦 好困啊 我要睡觉 起不来了 梦里见 今天早点睡 醒了又睡 被子不让我起 让我再睡会
        睡到|自然醒 明天再说吧 困到没朋友 好想|回床上 天还没亮呢 早上|起不来""",
    "心动": """爱了爱了 给你|小心心 你好|可爱呀 好喜欢你呀 心都要化了 这是|心动的感觉 见到你就脸红 偷偷|想你了
        做我女朋友 想抱抱你 我养你啊 亲亲 你笑起来真好看 只喜欢你 一起|看星星吧""",
    "害怕": """你别过来啊 我怕了 有话好好说 我不敢动 老板在看我 妈妈我怕 别打我 我错了还不行吗 快跑！ 晚上不敢看
        身后有人 求放过 你不要过来 我先走了 别看我身后""",
    "疑惑": """你在说什么？ 我是谁？ 什么意思？ 为什么呢 你谁啊 我做错什么了 这是什么东西 看不懂 怎么说？ 难道不是吗
        在干嘛 所以呢？ 我怎么不知道 是我的错吗 请问有事吗 这也能行吗""",
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
    "谁": """我 你 他 她 我们 你们 大家 老板 老师 妈妈 爸爸 宝宝 朋友 小猫 小狗 同学 同事 兄弟 姐姐 哥哥 妹妹 弟弟
        奶奶 爷爷 老公 老婆 先生 小姐 美女 帅哥 经理 医生 警察 司机 男人 女人 孩子 客户 程序员 学生 群主 网友 主人
        皇上 公主 王子 高手 傻子 猪 鸭子 鸽子 老虎 兔子 狐狸 本人 自己 别人 单身狗 小朋友 大佬 大哥 亲爱的 隔壁老王
        家人们 咱们""",
    "态": """正在 已经 还没 偷偷 努力 终于 天天 从不 可能 好像 真的 假装 重新 打算 喜欢 害怕 不敢""",
    "动": """吃饭 睡觉 上班 下班 加班 学习 写作业 考试 开会 喝茶 喝水 喝酒 喝奶茶 买菜 买单 做饭 洗碗 洗头 起床 出门
        回家 搬家 赚钱 花钱 还钱 发工资 发红包 充电 关机 上网 打游戏 看书 看电影 看戏 听歌 拍照 自拍 聊天 打电话 做梦
        思考 生气 哭 笑 分手 表白 抱抱 打工 搬砖 写代码 改需求 请假 吃药 开车 走路 飞 点外卖 吃火锅 吃瓜 养猫 种花
        讲故事 吵架 打架 道歉 感谢 祝福 撤回 转发 点赞 装傻 干活 冷静 报名 面试 签到 画画 早起 熬夜 复习 做人 说话
        闭嘴 回复 照镜子 变身 抓人 拜年 过年""",
    "物": """奶茶 面包 面条 包子 火锅 鱼 西瓜 白菜 早饭 午饭 晚饭 外卖 快递 手机 电脑 空调 床 被子 眼镜 书包 钱包 钱
        红包 工资 作业 问题 代码 需求 文件 表情包 头发 眼睛 嘴 手 脑子 脸 心 梦想 爱情 友情 生活 人生 时间 青春 机会
        故事 歌 电影 游戏 花 山 水 火 雨 太阳 月亮 星星 天空 海 飞机 火车 自行车 门 碗 书 地图 药 镜子 牙 锅 瓜 酒
        人品 理由 信号 排名 体重 假期 周末 天气 毛病 格局 语文""",
    "样": """开心 快乐 难过 生气 无聊 无语 得意 困 累 冷 热 香 大 小 多 少 高 长 快 新 美 丑 帅 可爱 漂亮 傻 厉害 重要
        困难 安全 正常 完美 自由 尴尬 紧张 失望 冷静 优秀 努力 穷 有钱 好吃 好看 好听 好玩 亮 白 红 绝望 低调 委屈
        感动 讲道理 没文化 要命 安静 吵 远""",
    "时": """今天 明天 后天 早上 中午 下午 晚上 周一 周五 周末 上午 现在 刚才 以后 下次 上次 春天 过年 小时候 下个月
        去年 明年 假期 星期天 最后一次""",
    "叹": """啊 哦 嗯 哎呀 嘿嘿 哈哈 呵呵 呜呜 再见 拜拜 谢谢 对不起 没关系 好的 收到 可以 不行 安排 懂了 行吧 算了
        真香 完了 厉害 走开 早安 晚安 你好 不要 是的 没错 当然 来了""",
    "数": """一 两 三 五 万 0 1 2 3 4 5 6 7 8 9 10 12 18 20 24 30 50 66 88 99 100 250 520 666 996 1314 2024 3.5 0.1""",
    "量": """个 只 条 张 次 天 年 块 碗 口 件 本 把 分 群""",
    "地": """家 公司 床上 地上 天上 路上 车上 海边 上海 火星 中国 梦里 群里 网上 门口 机场 操场 心里""",
    "英": """OK BUG APP GG VIP KTV PPT 520 emo PK hello AI IT UP 4G 5G hi no yes come on cool""",
}


def list_alphabet() -> list[str]:
    """Every character that a line may hold, in a fixed order."""
    return sorted(ALPHABET)


def list_readable(texts: Iterable[str]) -> list[str]:
    """Those words, lines or patterns that keep to the alphabet; a pattern's gaps and a line's bar do not count."""
    return [text for text in texts if set(re.sub(r"{.}|[|]", "", text)) <= set(ALPHABET)]


def is_unseen(line: str) -> bool:
    """Whether a line is kept for images that no model has trained on; the line itself decides it for good."""
    return zlib.crc32(line.replace("|", "").encode()) % UNSEEN_SHARE == 0


def fill_pattern(rng: random.Random, pattern: str, words: dict[str, list[str]]) -> str:
    """The pattern with a word of its kind in each gap."""
    while "{" in pattern:
        start, end = pattern.index("{"), pattern.index("}")
        pattern = pattern[:start] + rng.choice(words[pattern[start + 1 : end]]) + pattern[end + 1 :]
    return pattern


class LineSource:
    """Lines without end, each once.

    Args:
        unseen: only lines that the other half of the world never gets; else only the others.
    """

    def __init__(self, unseen: bool):
        self.unseen = unseen
        self._words = {kind: list_readable(words.split()) for kind, words in WORDS.items()}
        self._lines = {mood: list_readable(lines.split()) for mood, lines in LINES.items()}
        self._patterns = list_readable(PATTERNS.split())
        self._all_words = list(chain(*self._words.values()))
        self._alphabet = list_alphabet()
        self._beginnings = [character for character in self._alphabet if character not in PUNCTUATION]
        self._given: set[str] = set()

    def next_line(self, rng: random.Random, mood: str) -> str:
        """A new line for a meme of that mood: written, composed or mixed."""
        while True:
            kind = rng.choices(("written", "composed", "mixed"), (3, 7, 1))[0]
            if kind == "written":
                line = rng.choice(self._lines[mood])
            elif kind == "composed":
                line = self.compose(rng)
            else:
                line = self.mix(rng)
            text = line.replace("|", "")
            if len(text) <= LONGEST_LINE and text not in self._given and is_unseen(line) == self.unseen:
                self._given.add(text)
                return line

    def compose(self, rng: random.Random) -> str:
        """A pattern with its gaps filled."""
        return fill_pattern(rng, rng.choice(self._patterns), self._words)

    def mix(self, rng: random.Random) -> str:
        """Words one after the other, or up to LONGEST_LINE characters of the alphabet."""
        length = rng.randint(1, LONGEST_LINE)
        if rng.random() < 0.5:
            return self.draw_characters(rng, length)
        line = ""
        while len(line) < length:
            line += rng.choice(self._all_words)
        return line

    def draw_characters(self, rng: random.Random, count: int) -> str:
        """Characters of the alphabet, each as likely as the others; no punctuation in front."""
        return "".join(rng.choice(self._beginnings if index == 0 else self._alphabet) for index in range(count))
