"""The course: exercises cut from the lecture's own files, and a grader. Lecturers begin with README.md.

    exercises.py   the table: function, points, task, hint, question
    source.py      find, cut and put back functions in a source file
    handout.py     make a student's copy
    exams.py       what the exams share; the exams are in chapter1.py to chapter8.py
    witness.py     run an exam on a student's file, in a process of its own
    conduct.py     what holds for every function alike: inputs unchanged, gradients, no drawing of its own
    judge.py       compare, give points, draw pictures
    check.py       the lecturer's own test of all this

For lecturers only: answers.md (the written questions), mutants.py (typical mistakes), second.py (another right solution
of each exercise), reading_a_run.py (its plots).
"""
