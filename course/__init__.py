"""The course: exercises cut from the lecture's own files, and a grader. Lecturers begin with README.md.

    exercises.py   the table: function, points, task, hint, question
    source.py      find, cut and put back functions in a source file
    handout.py     make a student's copy
    notebook.py    a notebook a chapter
    exams.py       what the exams share; the exams are in chapter1.py to chapter8.py
    witness.py     run an exam on a student's file, in a process of its own
    conduct.py     what holds for every function alike: inputs unchanged, gradients, no drawing of its own
    judge.py       compare, give points, draw pictures
    classes.py     grade a class: a row for each hand-in, whatever it does
    room.py        the folder in which a hand-in's code runs: nothing in it helps to cheat
    usher.py       the process that runs it there
    gradescope.py  an autograder for Gradescope
    check.py       the lecturer's own test of all this

For lecturers only: answers.md (the written questions), mutants.py (typical mistakes), second.py (another right solution
of each exercise), reading_a_run.py (its plots).
"""
