<?php
// The database stays at the origin; the cell's tunnel leads to it. A connection is opened for each
// request and closed after it, so none is open while the guest is suspended.
$c->pg_connect[] = "dbname=davical user=davical_app password=vmatrix-agenda host=172.21.162.20 port=5432 connect_timeout=10";
$c->system_name = "vMatrix agenda";
$c->admin_email = "admin@example.org";
$c->enable_auto_schedule = false;
