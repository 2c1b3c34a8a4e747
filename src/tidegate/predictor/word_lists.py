"""The words that prompts are made of. Another word makes other prompts of every seed."""

from __future__ import annotations


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(";"))


TOPICS = _entries(
    """
    photosynthesis; gravity; the French Revolution; inflation; volcanoes; the water cycle; black holes;
    democracy; the immune system; plate tectonics; supply and demand; climate change; the Roman Empire;
    neural networks; vaccines; the stock market; evolution; renewable energy; the Silk Road; jazz music;
    Shakespeare's plays; the human heart; electric cars; the Great Wall of China; quantum computing;
    coral reefs; the printing press; sleep; nutrition; time management; the Renaissance; bees and
    pollination; the moon landing; public transport; recycling; poetry; the Industrial Revolution;
    earthquakes; bread baking; chess openings; the solar system; ocean currents; glaciers; DNA; the Cold
    War; antibiotics; satellites; deserts; rainforests; the Olympic Games; opera; impressionist
    painting; architecture; mental health; public speaking; personal finance; taxation; the Great
    Depression; the Vikings; ancient Egypt; samurai culture; migration of birds; whales; volcanic
    islands; tea ceremonies; coffee roasting; beekeeping; urban gardening; carpentry; pottery;
    photography; open-source software; databases; encryption; operating systems; compilers; web
    browsers; cloud computing; robotics; self-driving cars; 3D printing; batteries; nuclear fusion; wind
    turbines; solar panels; bridges; aqueducts; lighthouses; railways; airships; submarines; meditation;
    yoga; marathon running; swimming; mountain climbing; cycling; football tactics; basketball; table
    tennis; Buddhism; Stoic philosophy; ethics; game theory; probability; statistics; prime numbers;
    geometry; calculus; the periodic table; chemical bonds; acids and bases; sound waves; magnetism;
    lightning; rainbows; fossils; dinosaurs; honey; chocolate; cheese making; fermentation; spices;
    street food; folk tales; mythology; calligraphy; sign language; dialects; translation; journalism;
    copyright; patents; contracts; human rights; libraries
    """
)
PLACES = _entries(
    """
    France; Japan; Brazil; Kenya; Canada; Norway; India; Egypt; Peru; Greece; Vietnam; Morocco; Iceland;
    Chile; Poland; Portugal; Mexico; Turkey; Thailand; Ireland; Sweden; Ghana; Nepal; Cuba; Austria;
    Finland; Spain; Italy; Mongolia; Paris; Tokyo; Nairobi; Lima; Oslo; Berlin; Mumbai; Cairo; Athens;
    Hanoi; Lisbon; Vienna; Prague; Dublin; Seoul; Venice; Istanbul; Marrakesh; Sydney; Montreal;
    Chicago; Havana; Kyoto; Edinburgh; Florence; Bangkok; Quito
    """
)
CREATURES = _entries(
    """
    fox; owl; dragon; wolf; rabbit; whale; robot; cat; dog; sparrow; tortoise; bear; mouse; elephant;
    crow; octopus; horse; frog; lion; penguin; squirrel; bee; spider; goat; deer; salmon; hedgehog;
    otter; parrot; camel; snail; ghost; giant; fairy
    """
)
JOBS = _entries(
    """
    teacher; nurse; baker; farmer; lighthouse keeper; carpenter; pilot; detective; librarian; fisherman;
    gardener; violinist; astronaut; mail carrier; software engineer; chef; painter; taxi driver;
    blacksmith; doctor; tailor; firefighter; journalist; archaeologist; clockmaker; sailor; shepherd;
    translator; train conductor; poet
    """
)
NAMES = _entries(
    """
    Anna; Ben; Clara; David; Elena; Felix; Grace; Hugo; Iris; Jonas; Kira; Liam; Maya; Noah; Olga;
    Peter; Quinn; Rosa; Sam; Tara; Uma; Victor; Wendy; Yusuf; Zoe; Amir; Bianca; Chen; Dara; Emil;
    Fatima; Goran; Hana; Ivan; Jamila; Kofi; Lucia; Mateo; Nadia
    """
)
THINGS = _entries(
    """
    apples; books; pencils; marbles; tickets; coins; stamps; bottles; chairs; oranges; cards; candles;
    boxes; flowers; cookies; bricks; shirts; buttons; stones; shells; lamps; plates; bicycles; keys;
    notebooks
    """
)
ADJECTIVES = _entries(
    """
    small; brave; lonely; curious; old; clever; lazy; mysterious; golden; forgotten; cheerful; stubborn;
    quiet; enormous; kind; clumsy; invisible; sleepy; proud; honest; nervous; famous; hungry; magical;
    broken
    """
)
SETTINGS = _entries(
    """
    in a snowy village; on a distant planet; in an abandoned factory; at the bottom of the sea; in a
    busy market; during a thunderstorm; in a castle above the clouds; on a night train; in the year
    2300; in a tiny library; on an island without a name; behind the waterfall; in the last forest; at a
    village fair; in the desert; inside an old clock; on the roof of a hotel; in a city without lights;
    at the edge of the map; in winter
    """
)
TASKS = _entries(
    """
    reverses a string; checks whether a number is prime; sorts a list of numbers; counts the vowels in a
    text; computes the factorial of a number; finds the largest element of a list; merges two sorted
    lists; removes duplicates from a list; checks whether a word is a palindrome; converts Celsius to
    Fahrenheit; computes the Fibonacci numbers; finds the greatest common divisor of two numbers; counts
    words in a file; validates an email address; reads a CSV file; generates a random password; flattens
    a nested list; rotates a list by k places; transposes a matrix; computes the average of a list;
    finds anagrams in a list of words; converts a number to binary; implements a stack; implements a
    queue; implements binary search; implements bubble sort; parses a date; rounds a number to two
    decimals; draws a triangle of stars; computes compound interest; simulates rolling two dice; finds
    the second largest number; swaps two variables; implements a linked list; counts how often each
    letter occurs; checks whether brackets are balanced
    """
)
LANGUAGES = _entries(
    """
    Python; JavaScript; Java; C; C++; Go; Ruby; Rust; Bash; SQL
    """
)
ACTIVITIES = _entries(
    """
    plant tomatoes; change a bicycle tyre; bake bread; prepare for a job interview; learn a new
    language; plan a birthday party; write a cover letter; build a bookshelf; train for a race; save
    money; clean a kitchen; start a blog; pack for a long journey; study for an exam; cook rice; make an
    omelette; tie a tie; paint a wall; organise a desk; start a small business; write a poem; give a
    speech; fix a leaking tap; care for a houseplant; take better photographs; fall asleep faster; learn
    to swim; choose a laptop; adopt a dog; host a dinner; read more books; set up a home network; make a
    budget; grow herbs indoors; repair a torn shirt
    """
)
