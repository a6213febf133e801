"""Words that suggest minors, and the look-alikes that hide them. Data only; :mod:`.minors` does the matching.

Whole words of English. The list errs on dropping: "a baby bottle" and "in A minor" go too; "kidney" stays.
"""

_PEOPLE = """
adolescence adolescent adolescents babies baby boy boyhood boyish boys child childhood childish childlike children
childrens childs girl girlhood girlie girlies girlish girls grandchild grandchildren infant infantile infants
jailbait juvenile juveniles kid kiddie kiddies kiddo kiddos kiddy kids lass lassie loli lolicon lolis lolita lolitas
minor minors newborn newborns nymphet nymphets orphan orphans prepubescent prepubescents preschooler preschoolers
preteen preteens pubescent pubescents schoolboy schoolboys schoolchild schoolchildren schoolgirl schoolgirls schoolkid
schoolkids shota shotacon stepchild stepchildren teen teenage teenaged teenager teenagers teenie teens toddler toddlers
tween tweens underage underaged youngster youngsters youth youths
"""
_PLACES = """
barelylegal daycare elementaryschool gradeschool grammarschool highschool highschooler highschoolers juniorhigh
kindergarten kindergartener kindergartner middleschool middleschooler middleschoolers nurseryschool playgroup preschool
primaryschool schooluniform schooluniforms sweetsixteen
"""
_GRADES = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"

WORDS = frozenset(
    [*_PEOPLE.split(), *_PLACES.split()]
    + [f"{number}{grade}" for number in _GRADES.split() for grade in ("grade", "grader", "graders")]
)
#: Words that two innocent neighbours spell when the space between them is taken out: "5 min or so", "shot a".
NEVER_SPLIT = frozenset({"minor", "shota"})

#: Twenty and above are no minors: "twenty-five" is not five, hence the tens.
_COUNT = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
"""
NUMBERS = {word: value for value, word in enumerate(_COUNT.split())}
TENS = ("twenty", "thirty", "forty", "fourty", "fifty", "sixty", "seventy", "eighty", "ninety")

#: Baby, child, boy, girl, families with children, children crossing, and the two signs of "no one under eighteen".
EMOJI = frozenset(map(chr, (0x1F476, 0x1F9D2, 0x1F466, 0x1F467, 0x1F46A, 0x1F6B8, 0x1F51E, 0x1F6BC, 0x1F47C)))

#: Letters of other alphabets that look Latin, small.
LOOKALIKES = str.maketrans(
    dict(zip("авсԁеһіӏјкмноԛрѕтухѵԝпгь", "abcdehiljkmhoqpstyxvwnrb", strict=True))
    | dict(zip("αβγεηικμνορστυχωϲ", "abyenikmnopstuxwc", strict=True))
    | dict(zip("ıɩɡɑøłđħŧɪᴋᴅɴᴇʀʙɢʟʜᴍᴏᴛᴜʏᴄᴀꜱɫɨᵻ", "iigaoldhtikdnerbglhmotuycaslii", strict=True))
    | {chr(start + n): chr(97 + n) for start in (0x1F150, 0x1F170, 0x1F1E6) for n in range(26)}
    | dict.fromkeys("\u115f\u1160\u3164\uffa0\u17b4\u17b5", "")
)
DIGITS = str.maketrans("01345678" + "9", "oieasgtb" + "g")
SYMBOLS = str.maketrans("@$!|¡€£+", "asiiieit")
