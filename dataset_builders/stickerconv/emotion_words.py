"""Words that name or show a feeling, by SER30K's emotion: what Figure 6 counts. Written for this project."""

from dataset_builders.schema import Emotion


WORDS: dict[Emotion, str] = {
    "anger": """
        anger angry angrier angrily annoy annoyed annoying annoyance argue argued arguing argument bitter bitterness blame blamed blaming bother bothered
        cruel enraged fight fighting fought frustrate frustrated frustrating frustration fume fuming furious fury grudge hate hated hateful hating hostile
        indignant indignation insult insulted insulting irritable irritated irritating irritation mad outrage outraged rage raging resent resentful resentment
        rude scream screamed screaming shout shouted shouting slam slammed spite spiteful unfair wronged yell yelled yelling
    """,
    "disgust": """
        appalled appalling awful contempt creep creepy cringe cringed cringing despise disgrace disgraceful disgust disgusted disgusting dislike distaste
        filth filthy foul grim grimy gross grossed horrible horrid icky loathe loathing mouldy moldy mould mold nasty nausea nauseous offended offensive puke
        queasy repelled repulsed repulsive revolting rotting shameful sick sickened sickening slimy smelly stink stinking stinks stank ugh unbearable vile
        vomit yuck
    """,
    "fear": """
        afraid agitated alarm alarmed alarming anxiety anxious anxiously apprehensive cautious cower danger dangerous dread dreaded dreading dreadful fear
        feared fearful fearing fears flinch flinched fright frighten frightened frightening hesitant horror insecure intimidated jittery jumpy nerves nervous
        nervously nightmare nightmares panic panicked panicking panicky paranoid petrified phobia risky scare scared scares scary shaking shaky spooked
        startled stress stressed stressful tense tension terrified terrifying terror threat threatened timid trapped trembling tremble uncertain uneasy unsafe
        vulnerable wary worried worries worry worrying
    """,
    "happiness": """
        admiration admire adore affection amused amusement amusing appreciate appreciated beaming bliss blissful celebrate celebrated celebrating celebration
        charming cheer cheered cheerful cheering cheers cherish comfort comforted comforting confident content cosy cozy delight delighted delightful eager
        ecstatic elated encouraged encouraging enjoy enjoyed enjoying enthusiasm enthusiastic excited excitement exciting fond fondly fun funny gentle giddy
        glad gladly glee gleeful grateful gratitude grin grinning happier happiest happily happiness happy hope hoped hopeful hoping hug hugged hugs inspired
        jolly joy joyful joyous kindness laugh laughed laughing laughs laughter love loved lovely loves loving lucky merry optimistic overjoyed peaceful
        pleased pleasure playful pride proud proudly relief relieved satisfaction satisfied smile smiled smiles smiling smug smitten support supportive sweet
        tender tenderly tenderness thank thankful thanks thrilled thrilling triumph triumphant warm warmer warmly warmth welcome wonderful yay
    """,
    "neutral": """
        calm calmed calming calmly composed fine indifferent neutral okay patience patient patiently quiet quietly reflective relax relaxed relaxing serene
        settled sober steady thoughtful unbothered unfazed
    """,
    "sadness": """
        abandoned ache aches aching alone apologise apologize apology ashamed bereaved bereft bleak broken cried cries cry crying defeated depressed
        depressing despair desperate despondent died disappoint disappointed disappointing disappointment discouraged dismal drained empty emptiness exhausted
        exhausting exhaustion failed failure forgotten forlorn gloom gloomy goodbye grief grieve grieved grieving guilt guilty heartache heartbreak
        heartbreaking heartbroken helpless homesick hopeless hurt hurting hurts ignored inadequate isolated lonelier loneliness lonely longing lose losing
        loss lost melancholy miserable misery miss missed missing mourn mourning numb pain painful pity regret regrets regretful rejected rejection remorse
        sad sadder sadly sadness sob sobbed sobbing sorrow sorry suffer suffered suffering tearful tears tired unhappy unloved upset useless weary weep
        weeping wept worthless wounded
    """,
    "surprise": """
        abrupt amaze amazed amazement amazing astonish astonished astonishing astonishment astounded baffled bewildered confused confusing confusion curious
        disbelief dumbfounded flabbergasted gasp gasped incredible incredibly incredulous marvel odd perplexed puzzled puzzling shock shocked shocking
        speechless strange stunned stunning sudden suddenly surprise surprised surprises surprising surprisingly unbelievable unexpected unexpectedly
        unforeseen weird whoa wonder wondered wondering wow
    """,
}
EMOTION_OF: dict[str, Emotion] = {word: emotion for emotion, words in WORDS.items() for word in words.split()}
