"""Synonyms of common caption words, written for clipkit: one group per line, its words interchangeable.

Left out because captions are about them: colours, numbers, directions and places (left, above, behind).
Also left out: words with a second everyday meaning that another word of the group lacks. A word stands in
one group only. Regular plurals and third persons follow from the base form (see text_edits).
"""

from __future__ import annotations

_GROUPS = """
man guy fellow
woman lady
boy lad
girl lass
child kid youngster
children kids youngsters
baby infant
people folks persons
individual human
friend pal buddy
mother mom mum
father dad daddy
grandmother grandma granny
grandfather grandpa
crowd throng
policeman cop
doctor physician
teacher instructor
soldier trooper
tourist sightseer
spectator onlooker
passerby pedestrian
bride newlywed
toddler tot
photo photograph picture image snapshot
drawing sketch
illustration depiction
poster placard
logo emblem
backdrop background
view vista
portrait likeness
street road
sidewalk pavement
highway motorway
path trail
alley lane
intersection crossroads
city town
village hamlet
house home
building edifice
restaurant eatery
shop store
supermarket grocery
hospital clinic
barn shed
castle fortress
church chapel
yard backyard
field meadow
forest woods woodland
beach shore seashore
ocean sea
creek brook
stone rock
sundown sunset
sunrise dawn daybreak
mist fog
storm tempest
blaze fire
border edge
area region zone
spot location
stairs staircase
fence railing
market bazaar
car automobile
truck lorry
bicycle bike
motorcycle motorbike
airplane plane aircraft aeroplane
helicopter chopper
boat vessel
taxi cab
dog hound
puppy pup
cat feline
kitten kitty
rabbit bunny
horse steed
pig hog
rooster cockerel
insect bug
snake serpent
animal creature beast
sofa couch
chair seat
carpet rug
curtain drape
cupboard cabinet
wardrobe closet
bucket pail
cup mug
plate dish
pan skillet
oven stove
refrigerator fridge
television tv
telephone phone
cellphone smartphone
computer pc
trash garbage rubbish
bag sack
backpack rucksack
purse handbag
hat cap
trousers pants
shoes footwear
jacket coat
sweater pullover
gown dress
clothes clothing garments
eyeglasses spectacles
toy plaything
rope cord
heap pile
cluster bunch
piece chunk
soup broth
cookie biscuit
candy sweets
vegetables veggies
beverage drink
dinner supper
celebration party
contest competition tournament
performance show
song tune
trip journey
big large
huge enormous gigantic massive
small little
tiny minuscule
wide broad
thin slender
elderly aged
modern contemporary
young youthful
beautiful lovely gorgeous
cute adorable
happy cheerful joyful glad
sad unhappy
angry furious
funny amusing humorous
tired weary exhausted
scared afraid frightened
calm tranquil peaceful serene
quiet silent
noisy loud
fast quick rapid speedy
slow sluggish
strong powerful
weak feeble
shiny glossy
dirty filthy grimy
tidy neat
damp moist
chilly cold
windy breezy
foggy misty
empty vacant
busy bustling
crowded packed
colorful colourful multicolored multicoloured
round circular
various assorted diverse
many numerous
whole entire
damaged broken
famous renowned
expensive costly pricey
cheap inexpensive
delicious tasty yummy
clever smart intelligent
brave courageous
strange odd weird peculiar
running sprinting dashing
walking strolling
jumping leaping hopping
sitting seated
looking gazing staring
looks gazes stares
watching observing viewing
smiling grinning
laughing giggling chuckling
crying weeping sobbing
shouting yelling screaming
talking speaking chatting
holding gripping grasping
throwing tossing hurling
hitting striking
eating consuming
drinking sipping
flying soaring
climbing ascending
falling tumbling
sleeping dozing napping slumbering
resting relaxing
fighting battling
hugging embracing cuddling
pulling tugging dragging
pushing shoving
showing displaying depicting
shows displays depicts
contains includes
picking plucking
gathered assembled
surrounded encircled
located situated
decorated adorned
"""

SYNONYMS: dict[str, tuple[str, ...]] = {
    word: tuple(other for other in group.split() if other != word)
    for group in _GROUPS.strip().splitlines()
    for word in group.split()
}
"""Word -> its synonyms, in lower case."""
