-- True once the route's migration was released: what goes by its old side reaches nobody from here.
ALTER TABLE device_route ADD COLUMN released boolean NOT NULL DEFAULT false;
