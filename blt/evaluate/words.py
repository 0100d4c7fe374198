"""Common English words of five to eight letters, at least four of them distinct, for the tasks about characters."""

from __future__ import annotations

_TEXT = """
about above across active actor afraid again agent agree alone along amount angle animal answer apart apple
around author autumn basic beach became before begin behind being below better beyond black blood board border
bottle branch brave bread break bridge bright bring broad broken brother brown brush build burden butter camera
candle carbon carpet castle cause chain chair chance change charge cheap child choice choose circle clean
clear climb close cloth cloud coast common corner couple course cousin cover crowd custom dance danger
daughter decide depth desert detail dinner direct doctor double doubt dream drink drive early earth eight either
empty engine enjoy enough entire equal escape event every exact exist extra faith family famous farmer father
figure final finger first flame flight floor flower follow forest forget former forty found frame fresh friend
front fruit future garden gather gentle glass global golden grain grand grass great green ground group growth
guard guess guide handle happen happy harbor heart heavy height hidden honest horse hotel house human hundred
hungry image impact income indeed inside island itself jacket joint judge juice jungle junior knife known ladder
language large laugh layer leader learn leather lemon length letter light limit linen listen little lunch
machine magic major manage manner margin market master matter meadow measure medical member mental metal middle
might minor minute mirror mixed model modern moment monkey month morning mother motion mountain mouse mouth
music narrow nation nature nearly needle night noise normal north notice novel number object ocean office often
older orange orbit order origin other outside owner oxygen paint palace panel paper parent party patch pattern
pearl pencil people perfect person phase phone photo piano picture piece pilot planet plant plate player pocket
poetry point police pound powder power praise price pride prince print prize profit public purple quick quiet
quite radio raise random range rapid rather reader reason record region remain repair report rescue result
return reveal rhythm right rival river robust rough round royal salmon sample scale school science screen search
season second secret shadow shape share sharp shelf shift shine short shoulder silent silver simple single
sister smart smile smoke social solid sound south space speak speech spirit spoke spring square stable stage
stair stand station steady stone storm story strange stream street strike string strong studio style sugar
summer supply surface switch symbol table talent target teach thing think thirty though thread thumb tiger
timber title today tomorrow touch tower track trade travel triangle truck trust under until upper urban useful
valley value velvet video village violet virus visit voice volume wagon water weather weight while white whole
window winter wisdom within wonder world worth wound write yellow young
"""

WORDS = tuple(_TEXT.split())
